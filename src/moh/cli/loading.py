"""The options for loading a model, shared by the commands: `--device`, `--dtype`, `--device-map`, `--revision`."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_loading(
    parser: argparse.ArgumentParser,
    *,
    dtype: str = "of the weights",
    auto: str = "the checkpoint's",
    named: str = "a model that is named on the hub",
) -> None:
    """Add the options, in a group of their own in the help.

    Args:
        parser: the command's.
        dtype: what `--dtype` is of, as its help begins: "of the weights".
        auto: which dtype "auto" stands for, in the help.
        named: what `--revision` is a branch, tag or commit of.
    """
    group = parser.add_argument_group("loading the model")
    group.add_argument("--device", help="such as cpu, cuda:1 or mps (default: the accelerator if there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help=f"{dtype} (default: %(default)s, {auto})")
    group.add_argument(
        "--device-map", metavar="MAP",
        help="spread a model of transformers over devices: auto, balanced, sequential, or JSON, module to device; instead of "
        "--device",
    )  # fmt: skip
    group.add_argument("--revision", help=f"branch, tag or commit of {named}")


def device_of(arguments: Namespace) -> torch.device:
    """The device that the options choose.

    Raises:
        ValueError: PyTorch does not know it or does not find it here.
    """
    import torch

    from moh.models.transformers.loading import default_device

    if arguments.device is None:
        return default_device()
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device must be a device that works here, got {arguments.device!r}: {reason}") from None
    return device


def placement(arguments: Namespace) -> dict[str, Any]:
    """Arguments of `load_causal_lm` and `load_as`: where the weights go, their dtype and the revision.

    Raises:
        ValueError: `--device` and `--device-map` are both given, or one can't be read.
    """
    import torch

    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    where = device_map_of(arguments)
    place: dict[str, Any] = {"device": device_of(arguments)} if where is None else {"device_map": where}
    return {"dtype": dtype, **revision(arguments), **place}


def device_map_of(arguments: Namespace) -> Any:
    """The argument of `from_pretrained`, or None if none is given.

    Raises:
        ValueError: `--device` is given too, or it can't be read.
    """
    device_map = arguments.device_map
    if device_map is None:
        return None
    if arguments.device is not None:
        raise ValueError(f"--device must be left out with --device-map, got {arguments.device!r}")
    if device_map.startswith("{"):
        try:
            return json.loads(device_map)
        except ValueError as error:
            raise ValueError(f"--device-map must be a name or a JSON object, got {device_map!r}: {error}") from None
    return device_map


def revision(arguments: Namespace, model: str | None = None) -> dict[str, Any]:
    """Argument of `from_pretrained` for the command's model, or for another one, if a revision is given.

    Raises:
        ValueError: the model is not a name on the hub.
    """
    from pathlib import Path

    model = arguments.model if model is None else model
    if arguments.revision is None:
        return {}
    if Path(model).expanduser().exists():
        raise ValueError(f"--revision is for a model that is named on the hub, and {model} is here")
    return {"revision": arguments.revision}


def language_model(arguments: Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model given on the command line, and its tokenizer.

    Raises:
        ValueError: an option can't be read, or the model can't be loaded.
    """
    from moh.models.transformers.loading import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(arguments.model, **revision(arguments))
    return load_causal_lm(arguments.model, **placement(arguments)), tokenizer


def classifier(arguments: Namespace, name: str | None = None) -> nn.Module:
    """The image classifier given on the command line, or another one, loaded the same way.

    Raises:
        ValueError: an option is not for classifiers, or the model can't be loaded.
    """
    from moh.models.classifiers import load_classifier

    device = device_of_images(arguments, arguments.model)
    if name is not None:
        return load_classifier(name, device=device)
    return load_classifier(arguments.model, device=device, **revision(arguments))


def device_of_images(arguments: Namespace, model: str) -> torch.device:
    """The device of a network that reads images: whole on one device, in float32.

    Raises:
        ValueError: `--device-map` is given, or a `--dtype` other than float32, or PyTorch does not know the device or does not
            find it here.
    """
    refuse_device_map(arguments, model)
    if arguments.dtype not in ("auto", "float32"):
        raise ValueError(
            f"--dtype must be float32 for a network that reads images, like {model}, got {arguments.dtype}"
        )
    return device_of(arguments)


def refuse_device_map(arguments: Namespace, model: str) -> None:
    """Check that `--device-map` is not given, for a model that is not a language model of transformers.

    Raises:
        ValueError: it is given.
    """
    if arguments.device_map is not None:
        raise ValueError(f"--device-map is for language models of transformers, and {model} is not one: use --device")
