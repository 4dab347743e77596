"""The kind of model at a path: language, images or diffusion, ours or not, in the format of transformers, timm or diffusers.

Reads the JSON files that these libraries write: no torch, no library, no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moh.models.transformers.families import family_of

Task = Literal["language", "images", "diffusion"]

DIFFUSION_TRANSFORMERS = {"MoHDiTTransformer2DModel": "moh.models.diffusers", "DiTTransformer2DModel": "diffusers"}
"""Supported classes of diffusion models -> the package to import them from."""

TIMM_SOURCES = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_filter_fn"),
    *("checkpoint_path", "cache_dir", "model_cfg", "feature_cfg"),
)
"""Arguments of `timm.create_model` that say where weights come from: no file or recipe may set them for a model."""


@dataclass(frozen=True)
class Kind:
    """The kind of a model.

    Attributes:
        task: "language" (encoders of text too), "images" (it reads them) or "diffusion" (it draws them).
        library: the library of its format: "transformers", "timm" or "diffusers".
        name: its name in the library: a model type, an architecture or the class of the denoising model; "" for a hub
            name, which is not looked up, and for a .gguf file.
    """

    task: Task
    library: Literal["transformers", "timm", "diffusers"]
    name: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether its class belongs to this package; it may still be dense."""
        return self.name.lower().startswith("moh")


def kind_of(model: str | Path | Mapping[str, Any], *, named: Task = "language") -> Kind:
    """The kind of a model.

    Args:
        model: a directory of a model or of a diffusers pipeline, a .gguf file, a hub name ("hf-hub:NAME" for timm's), or
            the contents of a config.json.
        named: the task to assume for a hub name.

    Raises:
        ValueError: the path does not exist, or has no readable configuration of these libraries; names it.
    """
    if isinstance(model, Mapping):
        return _of_config(model, "the configuration")
    name, folder = str(model), Path(model).expanduser()
    if name.startswith("hf-hub:"):
        return Kind("images", "timm")
    if folder.suffix == ".gguf":
        return Kind("language", "transformers")
    if folder.is_dir():
        config = saved_config(folder) or saved_config(folder / "transformer") or _read(folder / "model_index.json")
        if not config:
            raise ValueError(
                f"model {name!r} has no configuration that can be read: its config.json is missing or damaged"
            )
        return _of_config(config, f"the config.json of model {name!r}")
    if looks_local(model):
        raise ValueError(f"model must be a directory, a .gguf file or a hub name, but there is no {name!r}")
    of_timm = named == "images" and "/" not in name  # "hf-hub:OWNER/NAME" is timm's too
    return Kind(named, "diffusers" if named == "diffusion" else "timm" if of_timm else "transformers")


def saved_config(directory: str | Path) -> dict[str, Any]:
    """A directory's config.json; empty if missing or damaged."""
    return _read(Path(directory).expanduser() / "config.json")


def looks_local(path: str | Path) -> bool:
    """Whether a path can only be local: not a hub name, even if nothing is there."""
    return isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _of_config(config: Mapping[str, Any], where: str) -> Kind:
    if "_class_name" in config:
        return Kind("diffusion", "diffusers", str(config["_class_name"]))
    if "architecture" in config:
        return Kind("images", "timm", str(config["architecture"]))
    model_type, classes = str(config.get("model_type", "")), config.get("architectures") or ()
    if not model_type and not classes:
        raise ValueError(f"{where} names no model type of transformers, architecture of timm or class of diffusers")
    family = family_of(model_type)
    reads_images = (family is not None and family.images) or any("ImageClassification" in name for name in classes)
    return Kind("images" if reads_images else "language", "transformers", model_type)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
