"""Models by their names on the Hugging Face hub: what kind they are, and a local copy of those that are read from files.

Only configurations and, for a copy, weights are fetched; nothing that is in a repository is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moh.models.kinds import Kind, Task, kind_of, looks_local

_CONFIGURATIONS = ("config.json", "model_index.json")
_PARTS = ("", "transformer/", "vae/")
_SAFE = (
    *_CONFIGURATIONS,
    "*/config.json",
    "scheduler/*.json",
    *(f"{p}diffusion_pytorch_model*.safetensors*" for p in _PARTS),
)
_OTHER_PRECISIONS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")


def kind_at(model: str | Path, *, named: Task = "language", revision: str | None = None) -> Kind:
    """As `kind_of`, but the kind of a name on the hub is looked up there, in its configuration.

    Args:
        model: as in `kind_of`.
        named: the task to assume for a name whose configuration can't be fetched.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: as `kind_of`.
    """
    config = _fetched_configuration(str(model), revision) if is_hub_name(model) else {}
    return kind_of(config) if config else kind_of(model, named=named)


def is_hub_name(model: str | Path) -> bool:
    """Whether this is a name such as "owner/name", and no local path, file or name of timm's."""
    name = str(model)
    if isinstance(model, Path) or name.startswith("hf-hub:") or name.endswith(".gguf"):
        return False
    return name.count("/") == 1 and not looks_local(name) and not Path(name).exists()


def timm_name(model: str | Path, revision: str | None = None) -> str:
    """The name of a model by which `timm.create_model` finds it.

    Raises:
        ValueError: there is a revision, but the model is not on the hub.
    """
    name = f"hf-hub:{model}" if is_hub_name(model) else str(model)
    if revision is None:
        return name
    if not name.startswith("hf-hub:"):
        raise ValueError(f"revision must be None for a model that is not on the hub, got {revision!r} for {name!r}")
    return f"{name}@{revision}"


def keep_revision(model: Any, revision: str | None) -> None:
    """Note on a model the revision that it was loaded from, for what else is read from its repository."""
    if revision is not None:
        model.moh_revision = revision


def revision_of(model: Any) -> str | None:
    """The revision that `keep_revision` noted."""
    found: str | None = vars(model).get("moh_revision")
    return found


def local_diffusion(model: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a diffusion model or pipeline: itself, or a copy of the one with this name on the hub.

    The copy is in the hub's cache, where the next call finds it. Weights are fetched as safetensors; of a part without any
    the other weights are, which are then read as tensors alone (`weights_only`).

    Args:
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: there is no such directory or name, or it can't be fetched.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(model):
        raise ValueError(f"checkpoint must be a directory or a hub name, but there is no directory {str(model)!r}")
    import huggingface_hub

    def fetch(patterns: tuple[str, ...]) -> Path:
        options: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(_OTHER_PRECISIONS)}
        return Path(huggingface_hub.snapshot_download(str(model), revision=revision, **options))

    try:
        copy = fetch(_SAFE)
        parts = [part for part in _PARTS if (copy / part / "config.json").is_file()]
        pickled = [part for part in parts if not any((copy / part).glob("*.safetensors"))]
        if pickled:
            copy = fetch((*_SAFE, *(f"{part}diffusion_pytorch_model*.bin*" for part in pickled)))
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise ValueError(f"checkpoint {str(model)!r} can't be fetched: {' '.join(str(error).split())}") from None
    return copy


def _fetched_configuration(name: str, revision: str | None) -> dict[str, Any]:
    """The configuration of a repository; empty if none can be fetched, which is reported where the model is loaded."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    for file in _CONFIGURATIONS:
        try:
            copy = huggingface_hub.hf_hub_download(name, file, revision=revision)
            found = json.loads(Path(copy).read_text(encoding="utf-8"))
        except (EntryNotFoundError, OSError, ValueError):
            continue
        if isinstance(found, dict) and {"_class_name", "architecture", "model_type", "architectures"} & set(found):
            return found
    return {}
