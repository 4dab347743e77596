"""Promises of hub names: a model's kind is looked up, and diffusion models are copied as safetensors where there are any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the llm extra is not installed")

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: E402

from moh.models.hub import is_hub_name, kind_at, local_diffusion, timm_name  # noqa: E402
from moh.models.kinds import Kind  # noqa: E402


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], None]:
    """`hub("owner/name", {file: content})` makes a repository that the hub's own functions find; there is no other."""
    remote = tmp_path / "remote"

    def download(name: str, filename: str, *, revision: str | None = None) -> str:
        if not (remote / name).is_dir():
            raise LocalEntryNotFoundError("no connection")
        if not (remote / name / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(remote / name / filename)

    def snapshot(
        name: str,
        *,
        allow_patterns: list[str],
        ignore_patterns: list[str] = [],  # noqa: B006
        revision: str | None = None,
    ) -> str:
        if not (remote / name).is_dir():
            raise LocalEntryNotFoundError("no connection")
        for file in (remote / name).rglob("*"):
            path = file.relative_to(remote / name).as_posix()
            wanted = any(fnmatchcase(path, kind) for kind in allow_patterns)
            if file.is_file() and wanted and not any(fnmatchcase(path, kind) for kind in ignore_patterns):
                target = tmp_path / "cache" / name / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    def make(name: str, files: dict[str, Any]) -> None:
        for path, content in files.items():
            file = remote / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content))

    return make


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.json": {"model_type": "llama"}}, Kind("language", "transformers", "llama")),
        ({"config.json": {"model_type": "dinov2"}}, Kind("images", "transformers", "dinov2")),
        ({"config.json": {"architecture": "deit3"}}, Kind("images", "timm", "deit3")),
        ({"config.json": {"_class_name": "DiTTransformer2DModel"}}, Kind("diffusion", "diffusers", "DiTTransformer2DModel")),
        ({"model_index.json": {"_class_name": "DiTPipeline"}}, Kind("diffusion", "diffusers", "DiTPipeline")),
        ({"config.json": {"other": 1}}, Kind("language", "transformers")),
        ({"config.json": "{"}, Kind("language", "transformers")),
        (None, Kind("language", "transformers")),
    ],
)  # fmt: skip
def test_the_kind_of_a_name_is_looked_up_and_assumed_where_it_cannot_be(hub, files, kind) -> None:
    if files is not None:
        hub("owner/name", files)
    assert kind_at("owner/name") == kind


def test_what_is_local_or_timms_is_not_looked_up(hub, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "./a", "/a/b", "~/a", "a/b/c", "hf-hub:a/b", "a/b.gguf", "resnet18", tmp_path / "a"):
        assert not is_hub_name(name)
    assert is_hub_name("owner/other")


SHARDS = "transformer/diffusion_pytorch_model-00001-of-00001.safetensors"
INDEX = {"model_index.json": {"_class_name": "DiTPipeline"}, "transformer/config.json": {}, "vae/config.json": {}}
NEEDED = {"scheduler/scheduler_config.json": {}, SHARDS: "w", "vae/diffusion_pytorch_model.safetensors": "w"}
MORE = (
    "README.md",
    "code.py",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
)


def copied(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_pipeline_is_copied_without_code_pickles_and_other_precisions(hub) -> None:
    hub("owner/dit", INDEX | NEEDED | dict.fromkeys(MORE, "x"))
    assert copied(local_diffusion("owner/dit")) == {*INDEX, *NEEDED}


@pytest.mark.parametrize("within", ["", "transformer/"])
def test_weights_of_another_format_are_copied_only_where_there_are_no_safetensors(hub, within: str) -> None:
    files = INDEX if within else {"config.json": {}}
    hub("owner/old", files | {f"{within}diffusion_pytorch_model.bin": "x"})
    assert copied(local_diffusion("owner/old")) == {*files, f"{within}diffusion_pytorch_model.bin"}


def test_a_name_that_is_not_there_is_reported(hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint 'owner/none' can't be fetched: no connection"):
        local_diffusion("owner/none")
    with pytest.raises(ValueError, match="must be a directory or a hub name, but there is no directory 'a/b/c'"):
        local_diffusion("a/b/c")
    assert local_diffusion(tmp_path) == tmp_path


@pytest.mark.parametrize("pickled", ["transformer", "vae"])
def test_of_a_part_without_safetensors_the_other_weights_are_copied(hub, pickled: str) -> None:
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae") if part != pickled]
    both = [f"{part}/diffusion_pytorch_model.bin" for part in ("transformer", "vae")]
    hub("owner/mixed", INDEX | dict.fromkeys([*weights, *both], "x"))
    assert copied(local_diffusion("owner/mixed")) == {*INDEX, *weights, f"{pickled}/diffusion_pytorch_model.bin"}


def test_timm_gets_a_revision_of_what_is_on_the_hub_alone(tmp_path: Path) -> None:
    assert timm_name("owner/name", "v2") == "hf-hub:owner/name@v2" and timm_name("vit_tiny") == "vit_tiny"
    assert timm_name("hf-hub:owner/name", "v2") == "hf-hub:owner/name@v2"
    for local in (tmp_path, "vit_tiny"):
        with pytest.raises(ValueError, match="revision must be None for a model that is not on the hub, got 'v2'"):
            timm_name(local, "v2")
