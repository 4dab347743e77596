"""An image under a classifier at a share of heads: the likeliest classes, the time, and which patches used which head.

Only numbers and pictures; `parts` shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from moh.evaluation.speed import device_clock
from moh.explore.observing import median_seconds, observed
from moh.explore.subjects import Eyes, ImageSubject
from moh.inspection.page.samples import patch_grid, picture
from moh.inspection.trace import LayerTrace

TOP_CLASSES = 5
_SIDE = 448  # fewest pixels of the shaded picture's longer side
_UNUSED = 0.78  # opacity of the grey over a patch that did not use the head
_GREY = 128


@dataclass(frozen=True)
class ImageComparison:
    """An image, classified by the model at a share of heads and by the reference.

    Attributes:
        image: as the explored model saw it.
        pixels: `[C, H, W]`, the explored model's input.
        reference_pixels: the reference's input.
        classes: the likeliest classes with their probabilities, the likeliest first.
        reference_classes: the reference's; None without one.
        share: share of the heads that a patch used.
        layers: what every head of the explored model did; empty if its attention is of an unknown kind.
    """

    image: Image.Image
    pixels: Tensor
    reference_pixels: Tensor
    classes: list[tuple[str, float]]
    reference_classes: list[tuple[str, float]] | None
    share: float
    layers: list[LayerTrace]


def read_image(subject: ImageSubject, image: Image.Image, value: int | None) -> ImageComparison:
    """Classify an image with the model at a dial value, and with the reference.

    Args:
        subject: the classifier.
        image: of any mode and size; a photograph is turned upright first.
        value: of `subject.dial`; None keeps the model's own setting.

    Raises:
        ValueError: the dial has no such value.
    """
    upright = ImageOps.exif_transpose(image)
    pixels = subject.eyes.transform(upright)
    other_pixels = pixels if subject.reference_eyes is subject.eyes else subject.reference_eyes.transform(upright)
    with subject.at(value) as share:
        logits, layers = observed(subject.model, lambda: subject.eyes.logits(pixels))
        reference = None
        if subject.reference is not None:
            with subject.reference_at(), torch.no_grad():
                reference = _likeliest(subject.reference_eyes.logits(other_pixels), subject.classes)
    classes = _likeliest(logits, subject.classes)
    return ImageComparison(picture(pixels), pixels, other_pixels, classes, reference, share, layers)


def time_image(subject: ImageSubject, seen: ImageComparison, value: int | None) -> tuple[float, float | None]:
    """Seconds in which the model at a dial value classifies the image, and the reference's.

    Raises:
        ValueError: the dial has no such value.
    """
    clock = device_clock(next(subject.model.parameters()).device)

    def run(eyes: Eyes, pixels: Tensor) -> float:
        start = clock()
        eyes.logits(pixels)
        return clock() - start

    def run_reference() -> float:
        with subject.reference_at():
            return run(subject.reference_eyes, seen.reference_pixels)

    runs: list[Callable[[], float]] = [lambda: run(subject.eyes, seen.pixels)]
    if subject.reference is not None:
        runs.append(run_reference)
    with subject.at(value), torch.no_grad():
        seconds = median_seconds(runs)
    return seconds[0], seconds[1] if len(seconds) > 1 else None


def shaded_picture(seen: ImageComparison, layer: int, head: int) -> Image.Image:
    """The image with grey over the patches that did not use a head; the others are clearer the larger their gate.

    Raises:
        ValueError: there is no such layer or head, or its tokens don't form a grid over the image.
    """
    if not 0 <= layer < len(seen.layers):
        raise ValueError(f"layer must be between 0 and {len(seen.layers) - 1}, got {layer}")
    gates = seen.layers[layer].gates[0]  # [N, H]
    if not 0 <= head < gates.shape[1]:
        raise ValueError(f"head must be between 0 and {gates.shape[1] - 1}, got {head}")
    width, height = seen.image.size
    before, rows, columns = patch_grid(len(gates), width / height)
    weights = gates[before:, head].float().cpu()
    weights = weights / weights.max().clamp_min(1e-6)
    grey = torch.where(weights > 0, 0.45 * (1 - weights), _UNUSED).view(rows, columns)
    scale = max(1, -(-_SIDE // max(width, height)))
    size = (width * scale, height * scale)
    veil = Image.fromarray((grey * 255).round().to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST)
    shown = seen.image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    shown.paste((_GREY, _GREY, _GREY), (0, 0), veil)
    return shown


def _likeliest(logits: Tensor, classes: tuple[str, ...]) -> list[tuple[str, float]]:
    top = logits.softmax(-1).topk(min(TOP_CLASSES, len(classes)))
    return [(classes[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
