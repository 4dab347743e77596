"""Load the checkpoints published by the paper's authors into our models, exactly, and write our models as such checkpoints.

Each family has its own module; our own checkpoints need only `from_pretrained` or timm's loaders.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh._files import replacing_file, shard_files
from moh.config import MoHConfig
from moh.models.transformers.published import read_published_config

_FAMILIES = {
    "moh_llama": "moh.models.transformers.published",
    "transnext": "moh.models.timm.transnext.published",
    "dit": "moh.models.diffusers.published",
}
"""config["model"] -> the module of its family."""

_CLASSES = {"MoHLlamaForCausalLM": "moh_llama", "MoHTransNeXt": "transnext", "MoHDiTTransformer2DModel": "dit"}
"""Classes that have a published layout -> their family."""

_MARKS = {"transnext": "patch_embed1.proj.weight", "dit": "x_embedder.proj.weight"}
"""Families whose checkpoints are files -> a tensor that only they have."""

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
            None reads the config.json of a directory with the layout of the published MoH-LLaMA3-8B, or what a PyTorch file
            states: the arguments of its training or of `save_published`, else the file's name.
        dtype: of the model; None keeps the checkpoint's.

    Returns:
        the model in evaluation mode.

    Examples:
        `load_published("moh_transnext_base_75.pth")`, `load_published("7000000.pt", "MoH-DiT-XL/2-90")`

    Raises:
        ValueError: the model is unknown, there is no configuration, a key or a file is missing, or tensors are missing,
            unexpected or of the wrong shape; names them.
    """
    if config is None and isinstance(path_or_state_dict, Mapping):
        raise ValueError("config must be given with a state dict: only a directory or a file has its own")
    if config is None and Path(str(path_or_state_dict)).is_dir():
        config = read_published_config(str(path_or_state_dict))
    if isinstance(config, str):
        _check_name(config)
    elif config is not None:
        _check_family(config)
    state, arguments = _tensors_and_arguments(path_or_state_dict)
    if config is None:
        config = _stated_config(Path(str(path_or_state_dict)), state, arguments)
    elif isinstance(config, str):
        config = named_config(config, state)
    family = importlib.import_module(_FAMILIES[config["model"]])
    model: nn.Module = family.load(state, config, dtype)
    return model


def save_published(model: nn.Module, path: str | Path) -> None:
    """Write a model as the published code of its family reads it; `load_published(path)` reads it back.

    Args:
        model: a `MoHTransNeXt` or `MoHDiTTransformer2DModel` with two-stage routers whose first heads are shared, or a
            `MoHLlamaForCausalLM` with the heads of the published one: query norms choose a quarter of them, and the first half
            is shared.
        path: for a classifier a file such as "model.pth", its tensors as "model"; for a diffusion model a file such as
            "model.pt", its tensors as "ema". Both have the sizes and, if it is one of `NAMES`, the model's name as "args", a
            dict, which `torch.load` reads without unpickling objects. For a language model a new directory with a Llama's
            config.json, which names the code in the hub repository of MoH-LLaMA3-8B, and safetensors; save its tokenizer
            there afterwards. All appear whole or not at all.

    Raises:
        ValueError: the published code can't express the model; names the first difference. Or `path` can't be written.
    """
    families = [_CLASSES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _CLASSES]
    if not families:
        raise ValueError(
            f"model must be a {', '.join(list(_CLASSES)[:-1])} or {list(_CLASSES)[-1]} to be saved as published, "
            f"got {type(model).__name__}"
        )
    importlib.import_module(_FAMILIES[families[0]]).save(model, Path(path))


def write_checkpoint(file: Path, contents: Mapping[str, Any]) -> None:
    """Write a PyTorch file under a temporary name, then move it into place; its directory is made if missing.

    Raises:
        ValueError: `file` is a directory.
    """
    if file.is_dir():
        raise ValueError(f"path must be a file for this model, such as model.pt, but {file} is a directory")
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(file) as scratch:
        torch.save(dict(contents), scratch)


def check_heads(layers: Sequence[MoHConfig], *, routers: tuple[str, ...]) -> None:
    """Check that the published code can express these layers.

    Raises:
        ValueError: a layer has another router, chooses groups, shares other heads than the first, or has heads that no token
            uses.
    """
    for number, heads in enumerate(layers):
        where = f"model can't be saved as published: layer {number} must"
        if heads.router not in routers:
            raise ValueError(f"{where} have router {' or '.join(map(repr, routers))}, got {heads.router!r}")
        if heads.routing_unit != "head":
            raise ValueError(f"{where} choose single heads, got routing_unit={heads.routing_unit!r}")
        if heads.shared_indices != tuple(range(heads.num_shared)):
            raise ValueError(f"{where} share its first heads, got {list(heads.shared_indices)}")
        if heads.num_routed and not heads.active_heads:
            raise ValueError(
                f"{where} activate routed heads or share all {heads.num_heads}, got {heads.num_shared} shared"
            )


def cpu_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, without gradients."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def named_config(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published configuration of a model by its name; sizes that the name leaves open come from the tensors.

    Raises:
        ValueError: no published model has this name.
    """
    _check_name(name)
    found: dict[str, Any] = importlib.import_module(_FAMILIES[NAMES[name]]).named_config(name, state)
    return {"model": NAMES[name], **found}


def read_tensors(path_or_state_dict: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict (copied), a `.safetensors` or PyTorch file, or a directory.

    Raises:
        ValueError: the file is missing, unreadable, or not a state dict.
    """
    return _tensors_and_arguments(path_or_state_dict)[0]


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


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"config must be a mapping or one of {', '.join(NAMES)}, got {name!r}")


def _check_family(config: Mapping[str, Any]) -> None:
    if "model" not in config:
        raise ValueError("config must have the key 'model'")
    if config["model"] not in _FAMILIES:
        raise ValueError(f"config['model'] must be one of {', '.join(map(repr, _FAMILIES))}, got {config['model']!r}")


def _stated_config(file: Path, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration by a file's "args", else by its name.

    Raises:
        ValueError: neither states one.
    """
    family = next((name for name, mark in _MARKS.items() if mark in state), None)
    if family is not None:
        module = importlib.import_module(_FAMILIES[family])
        if all(key in arguments for key in module.KEYS):
            return {**arguments, "model": family}
        for name in (str(arguments.get("model")), file.stem):
            if NAMES.get(name) == family:
                return {**named_config(name, state), **module.training_sizes(arguments)}
    raise ValueError(
        f"config must be given (--name of the command): neither the arguments in {file} nor its name state a published model; "
        f"one of {', '.join(NAMES)}"
    )


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


def _tensors_and_arguments(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, as `read_tensors`, and the "args" of a PyTorch file; empty if there are none."""
    if isinstance(path_or_state_dict, Mapping):
        return {name: tensor.clone() for name, tensor in path_or_state_dict.items()}, {}  # the caller's must not change
    SafetensorError = require("safetensors", extra="hf").SafetensorError
    path = Path(path_or_state_dict)
    try:
        return _read(path)
    except (SafetensorError, pickle.UnpicklingError, KeyError, json.JSONDecodeError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"path_or_state_dict: {path} can't be read as tensors: {' '.join(str(error).split())}"
        ) from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file or directory, and a PyTorch file's "args"; never by unpickling arbitrary objects."""
    safetensors = require("safetensors.torch", extra="hf")
    if path.is_dir():
        tensors: dict[str, Tensor] = {}
        for file in _files(path):
            tensors |= _read(file)[0]
        return tensors, {}
    if not path.is_file():
        raise ValueError(f"path_or_state_dict: there is no file or directory {path}")
    if path.suffix == ".safetensors":
        return dict(safetensors.load_file(path)), {}
    # Mapped where the format allows: a training checkpoint also has an optimiser and is four times as large as its model
    with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints keep their arguments
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # In a training checkpoint the authors evaluate the averaged weights
    state = loaded.get("ema", loaded.get("model", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"path_or_state_dict: {path} holds no state dict")
    arguments = loaded.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    # No longer mapped: the file may change
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    return tensors, dict(arguments) if isinstance(arguments, dict) else {}
