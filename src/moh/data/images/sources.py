"""Labelled images of any origin: the protocol of a source, tensors in memory, parts of a source, class lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from moh.data.text.corpora import HELDOUT_EVERY

_TRIES = 100  # consecutive damaged images
HELDOUT_NAMES = ("validation", "val", "valid", "test")
"""Usual names of a data set's held-out part, in order of preference."""


_Batch = TypeVar("_Batch")


def take(batch: _Batch) -> _Batch:
    """The collate function for data sets that return whole batches."""
    return batch


class ImageSource(Protocol):
    """n images with labels. `image` raises `UnreadableImage` for a damaged one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""

    @property
    def labels(self) -> Tensor:
        """`[n]` int64."""

    def image(self, index: int) -> Image.Image:
        """The image, decoded."""

    def name(self, index: int) -> str:
        """Where the image came from, for messages."""


class UnreadableImage(ValueError):
    """An image that is damaged or missing."""


def next_readable(
    source: ImageSource, index: int, damaged: Callable[[int, UnreadableImage], object]
) -> tuple[Image.Image, int]:
    """The image at `index`, or the next readable one, and its index.

    Args:
        source: training images; the first follows the last.
        index: the first to try.
        damaged: called with the index of each unreadable image and its error.

    Raises:
        RuntimeError: a hundred consecutive images are unreadable, or all of them.
    """
    tries = min(_TRIES, len(source.labels))
    for place in ((index + offset) % len(source.labels) for offset in range(tries)):
        try:
            return source.image(place), place
        except UnreadableImage as error:
            damaged(place, error)
    raise RuntimeError(f"{tries} training images in a row can't be read, from {source.name(index)} on")


class TensorImages:
    """Images of one size in memory.

    Args:
        pixels: `[n, C, H, W]` uint8, C = 1 (grey) or 3 (RGB).
        labels: `[n]`, indices into `classes`.
        classes: names of the classes.
        mean: to normalise with, one number per channel, for pixels between 0 and 1; None leaves it to the model.
        std: likewise.

    Raises:
        ValueError: a wrong shape or dtype, or a label outside `classes`.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"pixels must be uint8 [n, 1 or 3, H, W], got {pixels.dtype} with shape {tuple(pixels.shape)}"
            )
        if labels.shape != pixels.shape[:1]:
            raise ValueError(f"labels must have shape {(len(pixels),)}, got {tuple(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(
                f"labels must be between 0 and {len(classes) - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        self.pixels = pixels
        self.labels = labels.long()
        self.classes = tuple(classes)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)

    def image(self, index: int) -> Image.Image:
        pixels = self.pixels[index].permute(1, 2, 0).numpy()  # [H, W, C]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

    def name(self, index: int) -> str:
        return f"image {index}"


class View:
    """Some images of a source, with its classes in the same or another order.

    Args:
        source: the images.
        indices: `[m]`, in the order to return them; None takes all.
        classes: the source's classes in another order; None keeps it.
    """

    def __init__(
        self, source: ImageSource, *, indices: Tensor | None = None, classes: Sequence[str] | None = None
    ) -> None:
        self.source = source
        self.indices = torch.arange(len(source.labels)) if indices is None else indices
        self.classes = source.classes if classes is None else tuple(classes)
        order = torch.tensor([self.classes.index(name) for name in source.classes])
        self.labels = order[source.labels[self.indices]]

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


def select(source: ImageSource, indices: Tensor) -> ImageSource:
    """The images at `indices` `[m]`; `TensorImages` stay `TensorImages`."""
    if isinstance(source, TensorImages):
        pixels, labels = source.pixels[indices], source.labels[indices]
        return TensorImages(pixels, labels, source.classes, mean=source.mean, std=source.std)
    return View(source, indices=indices)


def every_nth(source: ImageSource, count: int | None) -> ImageSource:
    """Up to `count` images, evenly spread over the source, hence over its classes; None takes all."""
    total = len(source.labels)
    if count is None or count >= total:
        return source
    if count < 1:
        raise ValueError(f"at least 1 image is needed, got {count}")
    return select(source, torch.arange(count) * total // count)


def hold_out(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """`(train, heldout)`: the 1st, 11th, 21st... image of each class, in the source's order, is held out.

    Raises:
        ValueError: a class has only one image.
    """
    labels = source.labels
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(source.classes):
        (places,) = (labels == label).nonzero(as_tuple=True)
        if len(places) == 1:
            raise ValueError(f"class {name!r} has a single image: it can't be both trained on and held out")
        held[places[::HELDOUT_EVERY]] = True
    return select(source, (~held).nonzero().flatten()), select(source, held.nonzero().flatten())


def check_same_classes(classes: Sequence[str], expected: Sequence[str], *, what: str, than: str) -> None:
    """Check that two lists have the same names, in any order.

    Raises:
        ValueError: names are missing or unexpected; lists up to five of each.
    """
    missing, unknown = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
    if missing or unknown:
        parts = [
            f"{word} {', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for word, names in (("lacks", missing), ("also has", unknown))
            if names
        ]
        raise ValueError(f"{what} must have the {len(expected)} classes of {than}, but {' and '.join(parts)}")


def with_classes(source: ImageSource, classes: Sequence[str], *, what: str, than: str) -> ImageSource:
    """The source with its labels as indices into `classes`.

    Args:
        what: the source, for the message.
        than: where `classes` come from, for the message.

    Raises:
        ValueError: the source has other classes.
    """
    check_same_classes(source.classes, classes, what=what, than=than)
    if tuple(source.classes) == tuple(classes):
        return source
    view = View(source, classes=classes)
    if isinstance(source, TensorImages):
        return TensorImages(source.pixels, view.labels, classes, mean=source.mean, std=source.std)
    return view
