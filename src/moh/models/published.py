"""Load the checkpoints published by the paper's authors into our models, exactly.

Each family has its own module; our own checkpoints need only `from_pretrained` or timm's loaders.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh._files import shard_files
from moh.models.transformers.published import read_published_config

_FAMILIES = {
    "moh_llama": "moh.models.transformers.published",
    "transnext": "moh.models.timm.transnext.published",
    "dit": "moh.models.diffusers.published",
}
"""config["model"] -> the module of its family."""

NAMES = {f"moh_transnext_{size}": "transnext" for size in ("small_75", "small_80", "base_75", "base_50")} | {
    f"MoH-DiT-{size}/2-{share}": "dit" for size in ("XL", "L", "B", "S") for share in (90, 75)
}
"""What the published code calls its models -> their family."""


def load_published(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | str | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build our model from a published checkpoint.

    Args:
        path_or_state_dict: tensors by their published names; or a `.safetensors` file; or a PyTorch file, read with
            `weights_only=True`; or a directory with a `.safetensors` file or `pytorch_model.bin`, or with the shards that
            `model.safetensors.index.json` or `pytorch_model.bin.index.json` lists.
        config: `model`, which names the family, and the published keys of the family's `load`: "moh_llama"
            (`moh.models.transformers.published`), "transnext" (`moh.models.timm.transnext.published`) or "dit"
            (`moh.models.diffusers.published`).
            Or a published model's name, "moh_transnext_base_75" or "MoH-DiT-XL/2-90" and so on: the rest is in the tensors.
            None reads the config.json of a directory with the layout of the published MoH-LLaMA3-8B.
        dtype: of the model; None keeps the checkpoint's.

    Returns:
        the model in evaluation mode.

    Examples:
        `load_published("moh_transnext_base_75.pth", "moh_transnext_base_75")`

    Raises:
        ValueError: the model is unknown, there is no configuration, a key or a file is missing, or tensors are missing,
            unexpected or of the wrong shape; names them.
    """
    if config is None:
        if isinstance(path_or_state_dict, Mapping):
            raise ValueError("config must be given with a state dict: only a directory has its own")
        config = read_published_config(path_or_state_dict)
    if isinstance(config, str):
        state = read_tensors(path_or_state_dict)
        path_or_state_dict, config = state, named_config(config, state)
    if "model" not in config:
        raise ValueError("config must have the key 'model'")
    if config["model"] not in _FAMILIES:
        raise ValueError(f"config['model'] must be one of {', '.join(map(repr, _FAMILIES))}, got {config['model']!r}")
    family = importlib.import_module(_FAMILIES[config["model"]])
    model: nn.Module = family.load(read_tensors(path_or_state_dict), config, dtype)
    return model


def named_config(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published configuration of a model by its name; sizes that the name leaves open come from the tensors.

    Raises:
        ValueError: no published model has this name.
    """
    if name not in NAMES:
        raise ValueError(f"config must be a mapping or one of {', '.join(NAMES)}, got {name!r}")
    found: dict[str, Any] = importlib.import_module(_FAMILIES[NAMES[name]]).named_config(name, state)
    return {"model": NAMES[name], **found}


def read_tensors(path_or_state_dict: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict (copied), a `.safetensors` or PyTorch file, or a directory.

    Raises:
        ValueError: the file is missing, unreadable, or not a state dict.
    """
    if isinstance(path_or_state_dict, Mapping):
        return {name: tensor.clone() for name, tensor in path_or_state_dict.items()}  # the caller's must not change
    SafetensorError = require("safetensors", extra="hf").SafetensorError
    path = Path(path_or_state_dict)
    try:
        return _read(path)
    except (SafetensorError, pickle.UnpicklingError, KeyError, json.JSONDecodeError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"path_or_state_dict: {path} can't be read as tensors: {' '.join(str(error).split())}"
        ) from None


def require_keys(config: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Check that a published configuration has the keys that a model needs.

    Raises:
        ValueError: a key is missing; names it.
    """
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"config must have the keys {', '.join(needed)}; missing: {', '.join(missing)}")


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Check that `state` has exactly the expected names and shapes.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape; names them.
    """
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing tensors: {_some(missing)}")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected tensors: {_some(extra)}")
    for name in sorted(expected.keys() & state.keys()):
        if state[name].shape != expected[name]:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name])}")
    if problems:
        raise ValueError("the checkpoint does not match the configuration: " + "; ".join(problems[:8]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _files(directory: Path) -> list[Path]:
    """The files of weights in a directory, as transformers names them; safetensors if it has both kinds."""
    for index, files in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (directory / index).is_file():
            return shard_files(directory / index)
        if found := sorted(directory.glob(files)):
            return found
    raise ValueError(
        f"path_or_state_dict: the directory {directory} holds no .safetensors file, no pytorch_model.bin and no "
        "pytorch_model.bin.index.json"
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or directory; never by unpickling arbitrary objects."""
    safetensors = require("safetensors.torch", extra="hf")
    if path.is_dir():
        tensors: dict[str, Tensor] = {}
        for file in _files(path):
            tensors |= _read(file)
        return tensors
    if not path.is_file():
        raise ValueError(f"path_or_state_dict: there is no file or directory {path}")
    if path.suffix == ".safetensors":
        return dict(safetensors.load_file(path))
    # Mapped where the format allows: a training checkpoint also has an optimiser and is four times as large as its model
    with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints keep their arguments
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # In a training checkpoint the authors evaluate the averaged weights
    state = loaded.get("ema", loaded.get("model", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"path_or_state_dict: {path} holds no state dict")
    return {name: tensor.clone() for name, tensor in state.items()}  # no longer mapped: the file may change
