"""`moh inspect --html`: which texts or images the page shows. Imports what it needs when it runs."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moh.training.images.sources import ImageSource

_TEXTS = 3  # of each group
_IMAGES_PER_CLASS = 2
_MOST_CLASSES = 10


def write_text_page(
    arguments: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
) -> None:
    """A page of the first texts of each group."""
    from moh.inspection.page import head_page, text_sample

    limit = min(2_000, arguments.max_tokens)
    shown = [(group, text) for group, members in texts.items() for text in members[:_TEXTS]]
    samples = [
        text_sample(model, tokenizer, text, name=f"{number}: {group}", group=group, max_tokens=limit)
        for number, (group, text) in enumerate(shown, 1)
    ]
    page = head_page(samples, title=f"{Path(arguments.model).name}: which head does what")
    page.save(arguments.html)
    print(f"{arguments.html}: {len(samples)} texts, {len(page.html.encode()) / 1e6:.1f} MB")


def write_image_page(arguments: Namespace, model: nn.Module, images: ImageSource) -> None:
    """A page of the first images of each class, of at most ten classes unless some are named; each class is a group."""
    from moh.inspection.page import head_page, image_sample
    from moh.models.image_loading import image_input
    from moh.training.images.augmentation import eval_transform

    chosen = arguments.classes or list(images.classes)[:_MOST_CLASSES]
    if unknown := [name for name in chosen if name not in images.classes]:
        raise ValueError(f"--classes must be among {', '.join(images.classes)}, got {', '.join(unknown)}")
    wanted = image_input(model)
    transform = eval_transform(wanted)
    samples = []
    for name in chosen:
        label = images.classes.index(name)
        readable = _readable(images, (images.labels == label).nonzero().flatten().tolist())
        for index, image in islice(readable, _IMAGES_PER_CLASS):
            samples.append(image_sample(model, image, transform, name=f"{name}, {images.name(index)}", group=name))
    page = head_page(samples, title=f"{Path(arguments.model).name}: which head does what")
    page.save(arguments.html)
    print(f"{arguments.html}: {len(samples)} images, {len(page.html.encode()) / 1e6:.1f} MB")


def _readable(images: ImageSource, indices: list[int]) -> Iterator[tuple[int, Image]]:
    """The images that can be read, with their indices; says which can't."""
    from moh.training.images.sources import UnreadableImage

    for index in indices:
        try:
            yield index, images.image(index)
        except UnreadableImage as error:
            print(f"skipped: {error}", file=sys.stderr)
