"""Image classifiers of timm and of transformers, behind one set of functions. Extra `vision`, for transformers' also `llm`.

A classifier of timm holds its input and its class names (`moh.models.timm.loading`); one of transformers has the names in its
configuration (`id2label`) and its input in the preprocessor_config.json next to its weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh.data.images.augmentation import ProcessorInput
from moh.data.images.recipe import ImageInput
from moh.models.hub import is_hub_name, kind_at, revision_of
from moh.models.kinds import looks_local
from moh.models.timm import loading as timm_loading

_PROCESSOR_FILE = "preprocessor_config.json"


def load_classifier(
    path_or_name: str | Path, *, device: torch.device | None = None, revision: str | None = None
) -> nn.Module:
    """Load a classifier with its weights, in evaluation mode.

    Args:
        path_or_name: a directory in the format of timm or transformers; "OWNER/NAME" for one on the hub;
            "hf-hub:OWNER/NAME" or a plain name for one of timm's.
        device: where the model goes; None leaves it on the CPU.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: the directory or name does not exist, is not an image classifier, or is damaged.
    """
    if looks_local(path_or_name) and not Path(path_or_name).expanduser().is_dir():
        raise ValueError(
            f"model must be a directory, a hub name or one that timm knows, but there is no {str(path_or_name)!r}"
        )
    kind = kind_at(path_or_name, named="images", revision=revision)
    if kind.library != "transformers":
        of_hub = kind.library == "timm" and is_hub_name(path_or_name)
        name = f"hf-hub:{path_or_name}" if of_hub else path_or_name
        return timm_loading.load_image_classifier(name if revision is None else f"{name}@{revision}", device=device)
    from transformers import AutoModelForImageClassification

    from moh.models.transformers.loading import load_as, load_config

    classes = load_config(path_or_name, revision=revision).architectures or ()
    if not any("ImageClassification" in name for name in classes):  # an Auto class would make a new, random head
        raise ValueError(
            f"model {str(path_or_name)!r} is not an image classifier: its config.json names {' and '.join(classes) or 'no class'}"
        )
    model: nn.Module = load_as(AutoModelForImageClassification, path_or_name, device=device, revision=revision)
    return model.eval()


def image_input(model: Any) -> ImageInput | ProcessorInput:
    """The input of a classifier: size and normalisation, or the image processor that a model of transformers was loaded with.

    Warns where a model of transformers has no preprocessor_config.json: timm's defaults are taken.
    """
    if not _is_of_transformers(model):
        return timm_loading.image_input(model)
    source, config = model.name_or_path, model.config
    revision = revision_of(model)
    if source and _has_processor(source, revision):
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, revision=revision)
        return ProcessorInput(processor, int(config.num_channels))
    side = config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    size = (int(config.num_channels), int(height), int(width))
    assumed = timm_loading.default_input(size)
    warnings.warn(
        f"{source or type(model).__name__} has no {_PROCESSOR_FILE}: images are cropped to {assumed.crop_pct:.1%} of their "
        f"middle and normalised with timm's default mean {assumed.mean} and deviation {assumed.std}",
        stacklevel=2,
    )
    return assumed


def class_names(model: Any) -> tuple[str, ...] | None:
    """The names of the model's classes in the order of its logits; None if it has none."""
    if not _is_of_transformers(model):
        return timm_loading.class_names(model)
    labels = model.config.id2label
    names = tuple(str(labels[index]) for index in sorted(labels))
    unnamed = tuple(f"LABEL_{index}" for index in range(len(names)))  # what transformers writes without names
    return None if names == unnamed or len(names) != model.config.num_labels else names


def num_classes(model: Any) -> int:
    """How many classes a classifier tells apart."""
    return int(model.config.num_labels if _is_of_transformers(model) else model.num_classes)


def is_classifier(model: Any) -> bool:
    """Whether it is an image classifier of timm or transformers."""
    if _is_of_transformers(model):
        return model.main_input_name == "pixel_values" and "ImageClassification" in type(model).__name__
    return hasattr(model, "num_classes")


def logits_of(model: Any, pixels: Tensor) -> Tensor:
    """`[B, classes]`, the model's output for images `[B, C, H, W]`."""
    output = model(pixels)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _is_of_transformers(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "id2label")


def _has_processor(source: str, revision: str | None) -> bool:
    if Path(source).is_dir():
        return Path(source, _PROCESSOR_FILE).is_file()
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:  # from the cache where there is no connection
        huggingface_hub.hf_hub_download(source, _PROCESSOR_FILE, revision=revision)
    except LocalEntryNotFoundError:  # no connection, which is not the same as no file
        raise
    except EntryNotFoundError:
        return False
    return True
