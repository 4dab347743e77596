"""A recipe's classifier: made by timm, given its images' size and its classes, converted if the recipe has a conversion."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn
from transformers import TrainingArguments

import moh  # noqa: F401  registers our models with timm
from moh._files import replacing_directory
from moh._modes import evaluating
from moh.data.images.batches import SKIPPED, ImageBatches
from moh.data.images.recipe import ImageInput
from moh.data.images.sources import ImageSource, TensorImages, every_nth
from moh.models.kinds import saved_config
from moh.models.timm.loading import (
    check_local_model,
    check_weights,
    describe,
    image_input,
    load_image_classifier,
    save_image_classifier,
)
from moh.models.timm.transnext.published import own_names
from moh.routing import router_class
from moh.training.images.recipe import ImageModelRecipe, ImageRecipe

_ALL = 2**31  # calibration tokens: no limit, all patches of the images are used


def saved_arguments(recipe: ImageModelRecipe, model: nn.Module) -> dict[str, Any]:
    """The arguments of `timm.create_model` that rebuild the model; they are saved with it."""
    _, _, start = recipe.name.partition("local-dir:")
    saved = saved_config(start).get("model_args", {}) if start else {}
    own = {name: value for name, value in saved.items() if name != "num_classes"} | recipe.kwargs
    if hasattr(model, "moh_arguments"):  # one of our ViTs, made or converted; its dense control needs nothing more
        from moh.models.timm.saving import rebuild_arguments
        from moh.models.timm.vit import moh_attentions

        if moh_attentions(model):
            own = rebuild_arguments(model)
    return own | _drop_path(recipe)


def _drop_path(recipe: ImageModelRecipe) -> dict[str, Any]:
    return {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}


def build_model(recipe: ImageModelRecipe, classes: Sequence[str]) -> nn.Module:
    """Make the model, with pretrained weights if the recipe has some.

    Raises:
        ValueError: timm does not have the model, does not take the arguments, or can't load the weights.
    """
    weights: dict[str, Any] = {"pretrained": recipe.pretrained}
    if recipe.weights is not None:
        if not Path(recipe.weights).expanduser().is_file():
            raise ValueError(f"model.weights must be a file, but there is no {recipe.weights!r}")
        check_weights(Path(recipe.weights).expanduser())
        weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(Path(recipe.weights).expanduser())}}
    source, _, folder = recipe.name.partition(":")
    if source == "local-dir":
        check_local_model(Path(folder))
    plain = recipe.name.partition(".")[0]
    if ":" not in recipe.name and not timm.is_model(plain):
        similar = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(similar)}?" if similar else ""
        raise ValueError(f"model.name {recipe.name!r} is not a model of timm{hint}")
    try:
        model: nn.Module = timm.create_model(
            recipe.name, num_classes=len(classes), **weights, **recipe.kwargs, **_drop_path(recipe)
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"model {recipe.name!r} can't be made: {' '.join(str(error).split())}") from None
    if recipe.weights is not None:
        _check_weights(recipe.weights, model)
    return model


def _check_weights(file: str, model: nn.Module) -> None:
    """Check that a file has all of the model's weights but the classifier's: for a new classifier timm ignores missing ones.

    Raises:
        ValueError: the file lacks tensors of the model; names some.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = own_names(load_state_dict(file, weights_only=True), model)
    there = {name.removeprefix("module.").removeprefix("model.") for name in state}
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    missing = [name for name in model.state_dict() if name not in there and not name.startswith(heads)]
    if missing:
        raise ValueError(
            f"model.weights {file} lacks {len(missing)} of the model's tensors: {', '.join(missing[:3])} ...; for weights "
            "of a dense model use `conversion`"
        )


def resolve_input(recipe: ImageRecipe, model: nn.Module, train: ImageSource) -> ImageInput:
    """The model's input: as in the recipe, else as its weights were trained with, else as fits the data.

    Raises:
        ValueError: the recipe's `mean` does not match the model's channels.
    """
    data = recipe.data
    own = image_input(model)
    channels = int(recipe.model.kwargs.get("in_chans", own.size[0]))
    side = data.image_size or recipe.model.kwargs.get("img_size") or own.size[1:]
    height, width = (side, side) if isinstance(side, int) else tuple(side)
    mean, std = own.mean, own.std
    started = recipe.model.pretrained or recipe.model.weights is not None
    if not started and isinstance(train, TensorImages) and train.mean is not None and train.std is not None:
        mean, std = train.mean, train.std
    mean, std = tuple(data.mean) or mean, tuple(data.std) or std
    if len(mean) not in (1, channels):
        if data.mean:
            raise ValueError(f"data.mean must have one number or {channels}, one per channel, got {data.mean}")
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)  # the mean of the colours for every channel
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    crop = data.crop_pct or (own.crop_pct if started or min(height, width) > 64 else 1.0)
    return ImageInput((channels, height, width), mean, std, crop, data.interpolation or own.interpolation)


def prepare(model: nn.Module, wanted: ImageInput, classes: Sequence[str]) -> None:
    """Record the input and classes in the model's configuration, and check them with one black image.

    Raises:
        ValueError: the model has a different number of classes, or can't read images of this size (with the reason).
    """
    describe(model, wanted, classes)
    place = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(torch.zeros(1, *wanted.size, device=place.device, dtype=place.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model can't read images of size {wanted.size}: {' '.join(str(error).split())} "
            "(data.image_size, model.kwargs.img_size, model.kwargs.in_chans)"
        ) from None
    if tuple(logits.shape) != (1, len(classes)):
        raise ValueError(f"model must have {len(classes)} classes, as the data has, got {logits.shape[-1]}")


def freeze(model: nn.Module) -> None:
    """Let training change the classifier alone.

    Raises:
        ValueError: the model has no classifier by timm's description.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    trained = [name for name, _ in model.named_parameters() if name.startswith(heads)] if heads else []
    if not trained:
        raise ValueError(f"model.frozen needs a model with a classifier, and {type(model).__name__} has none")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def convert_model(
    recipe: ImageRecipe, model: nn.Module, wanted: ImageInput, train: ImageSource, arguments: TrainingArguments
) -> nn.Module:
    """The recipe's conversion of `model`, calibrated on training images as they are evaluated.

    Under torchrun one process converts and the others load its result, so that all have the same heads.

    Raises:
        ValueError: the model can't be converted; see `moh.convert`.
    """
    if arguments.world_size == 1:
        return _convert(recipe, model, wanted, train)
    target = Path(arguments.output_dir) / "converted"
    with arguments.main_process_first(local=False, desc="converting the model"):
        if arguments.process_index == 0:
            converted = _convert(recipe, model, wanted, train)
            with replacing_directory(target) as scratch:
                save_image_classifier(converted, scratch, model_args=saved_arguments(recipe.model, converted))
    return load_image_classifier(target)


def _convert(recipe: ImageRecipe, model: nn.Module, wanted: ImageInput, train: ImageSource) -> nn.Module:
    from moh.conversion import convert

    settings = recipe.conversion
    assert settings is not None
    calibration = None
    if router_class(settings.router).is_fitted:
        batches = ImageBatches(every_nth(train, settings.calibration_images), wanted)
        batch = batches.__getitems__(range(len(batches)))
        calibration = batch["images"][batch["labels"] != SKIPPED]
    return convert(  # type: ignore[no-any-return]
        model,
        share=settings.share,
        shared_heads=settings.shared_heads,
        active_heads=settings.active_heads,
        router=settings.router,
        calibration=calibration,
        calibration_tokens=_ALL,
        batch_size=16,
        allocation=settings.allocation,
        refit_output=settings.refit_output,
    )
