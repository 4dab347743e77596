"""Promises of `kind_of`: JSON files alone identify every format; errors name what can't be identified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moh.models.kinds import Kind, kind_of

FORMATS = {
    "llama": ({"config.json": {"model_type": "llama"}}, Kind("language", "transformers", "llama"), False),
    "moh llama": ({"config.json": {"model_type": "moh_llama"}}, Kind("language", "transformers", "moh_llama"), True),
    "bert": ({"config.json": {"model_type": "bert"}}, Kind("language", "transformers", "bert"), False),
    "vit": ({"config.json": {"model_type": "vit"}}, Kind("images", "transformers", "vit"), False),
    "another classifier": (
        {"config.json": {"model_type": "beit", "architectures": ["BeitForImageClassification"]}},
        Kind("images", "transformers", "beit"),
        False,
    ),
    "timm": ({"config.json": {"architecture": "deit3_small"}}, Kind("images", "timm", "deit3_small"), False),
    "timm, ours": ({"config.json": {"architecture": "moh_vit_x"}}, Kind("images", "timm", "moh_vit_x"), True),
    "transformer of a pipeline": (
        {"config.json": {"_class_name": "DiTTransformer2DModel"}},
        Kind("diffusion", "diffusers", "DiTTransformer2DModel"),
        False,
    ),
    "pipeline": (
        {
            "model_index.json": {"_class_name": "DiTPipeline"},
            "transformer/config.json": {"_class_name": "MoHDiTTransformer2DModel"},
        },
        Kind("diffusion", "diffusers", "MoHDiTTransformer2DModel"),
        True,
    ),
    "pipeline without transformer": (
        {"model_index.json": {"_class_name": "DDPMPipeline"}},
        Kind("diffusion", "diffusers", "DDPMPipeline"),
        False,
    ),
}


def write(folder: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", FORMATS)
def test_a_directory_says_what_it_holds(tmp_path: Path, name: str) -> None:
    files, kind, is_ours = FORMATS[name]
    write(tmp_path, files)
    assert kind_of(tmp_path) == kind_of(str(tmp_path)) == kind
    assert kind.is_ours == is_ours


def test_a_configuration_and_a_name_are_told_too() -> None:
    assert kind_of({"model_type": "moh_vit"}) == Kind("images", "transformers", "moh_vit")
    assert kind_of("hf-hub:timm/vit") == Kind("images", "timm")
    assert kind_of("some/model.gguf") == kind_of("org/name") == Kind("language", "transformers")
    assert kind_of("resnet18", named="images") == Kind("images", "timm")
    assert kind_of("org/name", named="images") == Kind("images", "transformers")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no '{}'"),
        ({}, "model '{}' has no configuration that can be read"),
        ({"config.json": "{"}, "model '{}' has no configuration that can be read"),
        ({"config.json": "[1]"}, "model '{}' has no configuration that can be read"),
        ({"config.json": {"size": 3}}, "config.json of model '{}' names no model type of transformers"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, files: dict[str, object] | None, message: str) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        write(folder, files)
    with pytest.raises(ValueError) as error:
        kind_of(str(folder))
    assert message.format(folder) in str(error.value)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, moh.models.kinds; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
