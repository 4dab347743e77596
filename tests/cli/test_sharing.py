"""Promises of `--push-to-hub` and `moh export`: what is on disk is on the hub, with its card; wrong input is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from local_hub import OWNER, stand_in


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in(tmp_path / "hub", monkeypatch)
    return tmp_path / "hub"


def test_convert_writes_a_card_and_pushes_the_directory(moh, base_dir, text_file, tmp_path, hub) -> None:
    heads = ["--shared-heads", 1, "--active-heads", 1, "--calibration-tokens", 1024, "--files", text_file]
    result = moh("convert", base_dir, tmp_path / "mine", *heads, "--push-to-hub")
    assert result.code == 0 and f"pushed to https://huggingface.co/{OWNER}/mine" in result.err
    there = hub / OWNER / "mine"
    assert {p.name for p in there.iterdir()} == {p.name for p in (tmp_path / "mine").iterdir()}
    card = (there / "README.md").read_text()
    assert f"| base model | `{base_dir.name}` |" in card and "| router | `threshold` |" in card
    assert f"up to 1,024 tokens of {text_file.name}" in card and f'"{OWNER}/mine"' in card


def test_export_adds_the_code_to_a_copy_and_pushes_it(moh, moh_dir, tmp_path, hub) -> None:
    result = moh("export", "remote-code", moh_dir, "-o", tmp_path / "shared", "--push-to-hub", "them/other")
    assert result.code == 0, result.err
    assert result.out == [f"{tmp_path / 'shared'}: with modeling_moh.py, loads anywhere with trust_remote_code=True"]
    for folder in (tmp_path / "shared", hub / "them" / "other"):
        assert (folder / "modeling_moh.py").is_file() and "auto_map" in (folder / "config.json").read_text()
    assert not (moh_dir / "modeling_moh.py").exists()


def test_export_in_place(moh, moh_dir, tmp_path) -> None:
    shutil.copytree(moh_dir, tmp_path / "model")
    (line,) = moh("export", "remote-code", tmp_path / "model", "--json").out
    assert json.loads(line) == {"output": str(tmp_path / "model"), "code": "modeling_moh.py"}
    assert (tmp_path / "model" / "modeling_moh.py").is_file()


def test_export_of_a_dense_model_is_refused(moh, base_dir) -> None:
    result = moh("export", "remote-code", base_dir)
    assert result.code != 0 and "directory must hold a MoH model of transformers" in result.err[-1]
