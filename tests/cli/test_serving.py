"""`moh serve`: `transformers serve` finds our models when loading; no network and no server here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moh.cli import serving
from moh.models.transformers import MoHLlamaForCausalLM
from moh.models.transformers.loading import load_tokenizer

NAME = "MoHLlamaForCausalLM"


@pytest.fixture(autouse=True)
def _transformers_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield
    vars(sys.modules["transformers"]).pop(NAME, None)


def served() -> Any:
    """The class that the server finds under our class's name."""
    return getattr(sys.modules["transformers"], NAME)


def test_the_server_loads_our_model_and_writes_text(moh_dir: Path) -> None:
    pytest.importorskip("uvicorn")
    from transformers.cli.serving.model_manager import ModelManager

    serving.make_servable(str(moh_dir))
    manager = ModelManager(device="cpu", force_model=str(moh_dir))
    model, processor = manager.load_model_and_processor(f"{moh_dir}@main")
    assert type(model) is MoHLlamaForCausalLM
    ids = processor("the head reads", return_tensors="pt").input_ids
    got = model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = MoHLlamaForCausalLM.from_pretrained(moh_dir).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)


def test_a_served_model_has_the_requested_share(moh_dir: Path) -> None:
    serving.make_servable(str(moh_dir), 0.75)
    model = served().from_pretrained(moh_dir)
    assert model.config.share == 0.75


def test_the_command_hands_over_with_the_options_of_transformers(
    moh: Any, moh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    seen: list[list[str]] = []
    monkeypatch.setattr("transformers.cli.transformers.app", seen.append)
    assert moh("serve", moh_dir, "--port", "8123", "--device", "cpu").code == 0
    assert seen == [["serve", str(moh_dir), "--port", "8123", "--device", "cpu"]]
    assert served() is MoHLlamaForCausalLM


def test_a_model_without_its_head_is_refused(moh: Any, moh_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder = tmp_path / "bare"
    shutil.copytree(moh_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MoHLlamaModel"]}), encoding="utf-8")
    result = moh("serve", folder)
    assert result.code == 2
    assert "must be saved as MoHLlamaForCausalLM, with its head, got MoHLlamaModel" in result.err[-1]
    assert load_tokenizer(folder) is not None
