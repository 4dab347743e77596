"""Save and load timm vision transformers with MoH attention, in timm's own format: config.json and model.safetensors.

timm rebuilds a model from a name and arguments; a converted one is `moh_vit` with the dense model's name as `base`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import push_to_hf_hub
from torch import nn

from moh._modes import evaluating
from moh.models.card import card_of, layers_of, push_card, write_card
from moh.models.heads import compact_heads, thresholds_of
from moh.models.timm.loading import class_names, load_image_classifier, save_image_classifier
from moh.models.timm.vit import moh_attentions

TOLERANCE = 1e-5
"""Largest difference between the outputs of a model and of its saved copy, relative to the largest value."""


def save_pretrained(model: nn.Module, directory: str | Path, *, model_args: Mapping[str, Any] | None = None) -> None:
    """Write a MoH model so that `from_pretrained` and timm ("local-dir:PATH", pretrained=True) read it.

    The files are read back and must reproduce the model's output on a random image before they are moved into place.

    Args:
        model: one of our presets, or converted by `moh.convert` from a model of `timm.create_model`.
        directory: made if it does not exist.
        model_args: arguments of `timm.create_model` for the dense model, beyond those that are detected: the image's size and
            channels, classes and pooling, and with timm 1.0.31 or later all that it was made with.

    Raises:
        ValueError: the model has no MoH attention, or name and arguments don't make the same model; no file is left.
    """
    arguments = rebuild_arguments(model) | dict(model_args or {})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial.") as scratch:
        try:
            save_image_classifier(model, scratch, model_args=arguments)
            same = _same_output(model, load_image_classifier(scratch))
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{_unlike(arguments)}: {' '.join(str(error).split())}") from None
        if not same:
            raise ValueError(f"{_unlike(arguments)}: it has the same weights but a different output")
        for file in Path(scratch).iterdir():
            os.replace(file, directory / file.name)
    if card_of(model) or not (directory / "README.md").exists():  # else what a card of ours says is not known here
        write_card(directory, layers_of(model), **card_of(model))


def push_to_hub(model: nn.Module, repo_id: str, *, model_args: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Push a MoH model to the hub by timm's `push_to_hf_hub`, with our card if the repository has none.

    Args:
        model: as in `save_pretrained`.
        repo_id: "NAME" or "OWNER/NAME"; timm then loads "hf-hub:OWNER/NAME".
        model_args: as in `save_pretrained`.
        options: other arguments of `push_to_hf_hub`: `private`, `token`, `commit_message`, ...

    Raises:
        ValueError: as `save_pretrained`; nothing is pushed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        save_pretrained(model, scratch, model_args=model_args)
        if not options.get("create_pr") and not options.get("revision"):  # the card would go to the main branch
            push_card(repo_id, scratch, **{name: options.get(name) for name in ("private", "token")})
    arguments = rebuild_arguments(model) | dict(model_args or {})
    names = class_names(model)
    labels = {} if names is None else {"label_names": list(names)}
    return push_to_hf_hub(
        model, repo_id, **{"safe_serialization": True, "model_config": labels, "model_args": arguments, **options}
    )


def from_pretrained(directory: str | Path, *, device: torch.device | None = None) -> nn.Module:
    """The model that `save_pretrained` wrote, in evaluation mode.

    Raises:
        ValueError: the model is missing or damaged.
    """
    return load_image_classifier(Path(directory), device=device)


def rebuild_arguments(model: Any) -> dict[str, Any]:
    """Arguments with which `timm.create_model(model.pretrained_cfg["architecture"], ...)` makes the model again.

    Raises:
        ValueError: the model has no MoH attention, or timm did not make it.
    """
    attentions = moh_attentions(model)
    if not attentions:
        raise ValueError("model has no MoH attention: save it with timm.models.save_for_hf")
    if not getattr(model, "pretrained_cfg", None) or not hasattr(model, "moh_arguments"):
        raise ValueError(
            "model can't be saved in timm's format, which rebuilds models by name: it must come from timm.create_model, "
            "or be converted from one that does; its state_dict() can always be saved"
        )
    layers = [attention.router.config for attention in attentions]
    current: dict[str, Any] = {
        "num_classes": model.num_classes,
        "in_chans": model.patch_embed.proj.in_channels,
        "global_pool": model.global_pool,
    }
    size = getattr(model.patch_embed, "img_size", None)
    if size is not None:
        current["img_size"] = list(size)
    own = {name: value for name, value in model.moh_arguments.items() if not _of_the_run(name)}
    return own | current | compact_heads(layers) | {"router": layers[0].router} | thresholds_of(layers)


def _of_the_run(name: str) -> bool:
    return name == "backend" or name.endswith("_rate")  # drop_rate, drop_path_rate, ...


def _unlike(arguments: Mapping[str, Any]) -> str:
    return (
        f"model can't be saved: the arguments {dict(arguments)} make a different model; give those that are missing as "
        "model_args"
    )


@torch.no_grad()
def _same_output(model: Any, other: nn.Module) -> bool:
    place = next(model.parameters())
    size = getattr(model.patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][1:]
    image = torch.randn(1, model.patch_embed.proj.in_channels, *size, generator=torch.Generator().manual_seed(0))
    image = image.to(place)
    with evaluating(model):
        expected = model(image)
    got = other.to(place)(image)
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())
