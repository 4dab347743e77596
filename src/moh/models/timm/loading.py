"""Load and save image classifiers in timm's format: a directory with config.json and model.safetensors, or a hub name.

The class names and the model's input are part of it (`model.pretrained_cfg`). Extra `vision`.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from moh.data.images.recipe import ImageInput
from moh.models.kinds import TIMM_SOURCES, kind_of, looks_local, saved_config


def load_image_classifier(path_or_name: str | Path, *, device: torch.device | None = None) -> nn.Module:
    """Load a classifier with its weights, in evaluation mode.

    Args:
        path_or_name: a directory in the format of `save_image_classifier` and timm, a hub name ("hf-hub:NAME"), or one of
            timm's models with published weights.
        device: where the model goes; None leaves it on the CPU.

    Returns:
        a timm model; see also `class_names(model)` and `image_input(model)`.

    Raises:
        ValueError: the directory or name does not exist, is not an image classifier, or is damaged.
    """
    name, local = str(path_or_name), Path(path_or_name).expanduser()
    if local.is_dir():
        if kind_of(local).library != "timm":
            raise ValueError(f"model {name!r} is not an image classifier: config.json names no architecture of timm")
        check_local_model(local)
        name = f"local-dir:{local}"
    elif looks_local(path_or_name):
        raise ValueError(f"model must be a directory or a name that timm knows, but there is no {name!r}")
    from safetensors import SafetensorError

    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, AssertionError, SafetensorError) as error:
        raise ValueError(f"model {str(path_or_name)!r} can't be loaded: {' '.join(str(error).split())}") from None
    return (model if device is None else model.to(device)).eval()


def check_local_model(directory: Path) -> None:
    """Check that a directory holds a model that timm can load without running anything that is in it.

    Raises:
        ValueError: its config.json names no model of timm or sets an argument that loads other weights, or its weights
            are a pickle of more than tensors; names the file.
    """
    config = saved_config(directory)
    architecture, arguments = str(config.get("architecture", "")), config.get("model_args") or {}
    where = f"model {str(directory)!r} can't be loaded: its config.json"
    if not timm.is_model(architecture.partition(".")[0]):
        raise ValueError(f"{where} names {architecture!r}, which is not a model of timm")
    if sources := sorted(set(arguments) & set(TIMM_SOURCES)):
        raise ValueError(f"{where} must have model_args of the model alone, but they set {', '.join(sources)}")
    if not (directory / "model.safetensors").is_file():  # timm's first choice
        for file in sorted(file for kind in ("*.bin", "*.pth", "*.pth.tar") for file in directory.glob(kind)):
            check_weights(file)


def check_weights(file: Path) -> None:
    """Check that a file of weights that is not in safetensors' format holds nothing but tensors: older versions of timm would
    run what else a pickle holds.

    Raises:
        ValueError: it can't be read, or holds more; names it.
    """
    if file.suffix == ".safetensors":
        return
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # a training's arguments
            torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"the weights {file} can't be read without running code in them: {reason}") from None


def save_image_classifier(model: nn.Module, directory: str | Path, *, model_args: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors, readable by `load_image_classifier` and by timm ("local-dir:PATH").

    Args:
        model: made by `timm.create_model` or `moh.convert`.
        directory: created if missing; files of other names in it are kept.
        model_args: arguments of `timm.create_model` that rebuild the model, without the number of classes.
    """
    names = class_names(model)
    save_for_hf(
        model,
        str(directory),
        model_config={} if names is None else {"label_names": list(names)},
        model_args={**model_args},
        safe_serialization=True,
    )


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the model's classes in the order of its logits; None if it has none."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if not names or len(names) != model.num_classes:
        return None
    return tuple(names.values() if isinstance(names, Mapping) else names)


def image_input(model: nn.Module) -> ImageInput:
    """The model's input."""
    config = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    size = tuple(config["input_size"])
    mean, std = (_per_channel(config[name], size[0]) for name in ("mean", "std"))
    return ImageInput(size, mean, std, float(config["crop_pct"]), str(config["interpolation"]))


def default_input(size: tuple[int, int, int]) -> ImageInput:
    """timm's defaults for a model of this input size (channels, height, width) that states nothing else."""
    config = resolve_data_config({"input_size": size})  # type: ignore[no-untyped-call]
    mean, std = (_per_channel(config[name], size[0]) for name in ("mean", "std"))
    return ImageInput(size, mean, std, float(config["crop_pct"]), str(config["interpolation"]))


def describe(model: nn.Module, wanted: ImageInput, classes: Sequence[str]) -> None:
    """Set what `image_input` and `class_names` return for a model; it is saved with the model."""
    described: dict[str, Any] = {
        **cast(dict[str, Any], model.pretrained_cfg),
        "input_size": wanted.size,
        "mean": wanted.mean,
        "std": wanted.std,
        "crop_pct": wanted.crop_pct,
        "interpolation": wanted.interpolation,
        "num_classes": len(classes),
        "label_names": list(classes),
    }
    for name in ("test_input_size", "test_crop_pct", "label_descriptions"):  # of the initial weights
        described.pop(name, None)
    model.pretrained_cfg = described  # type: ignore[assignment]


def _per_channel(values: Sequence[float] | float, channels: int) -> tuple[float, ...]:
    """One number per channel: the mean of the colours for a grey input, the same for all colours of grey weights."""
    numbers = tuple(values) if isinstance(values, Sequence) else (float(values),)
    return numbers if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels
