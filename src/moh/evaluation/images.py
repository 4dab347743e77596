"""Top-1, top-5 and per-class accuracy of an image classifier, its images per second and the share of heads it uses.

Works for any classifier of timm or transformers, MoH or dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.utils.metrics import accuracy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from moh._modes import evaluating
from moh.data.images.augmentation import ProcessorInput
from moh.data.images.batches import ImageBatches, readable_batches, report_damaged
from moh.data.images.recipe import ImageInput
from moh.data.images.sources import ImageSource, take, with_classes
from moh.evaluation.speed import device_clock
from moh.models.classifiers import class_names, image_input, logits_of, num_classes
from moh.routing import record_routing


@dataclass(frozen=True)
class ImageEvaluation:
    """How well a model classifies images.

    Attributes:
        top1: percent of images whose label is the likeliest class.
        top5: percent of images whose label is among the five likeliest classes.
        loss: mean cross-entropy, in nats.
        per_class: class -> top-1 in percent; None for a class without images.
        images: number of evaluated images.
        skipped: names of images that could not be read; they are not counted.
        images_per_second: of the model's forward passes alone, without reading the images.
        share: mean share of heads that a token used, over the MoH layers; None for a dense model.
    """

    top1: float
    top5: float
    loss: float
    per_class: dict[str, float | None]
    images: int
    skipped: tuple[str, ...]
    images_per_second: float
    share: float | None


@torch.no_grad()
def evaluate_images(
    model: nn.Module,
    dataset: ImageSource,
    *,
    wanted: ImageInput | ProcessorInput | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> ImageEvaluation:
    """Classify all images once.

    Args:
        model: of timm or transformers; used in evaluation mode and left in its own.
        dataset: labelled images, with the model's classes in any order.
        wanted: the model's expected input; None takes it from the model (`moh.models.classifiers.image_input`).
        batch_size: images per forward pass.
        workers: processes that load images; 0 loads them here.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: the images' classes are not the model's, no image can be read, or `batch_size` is below 1.
    """
    loader = image_loader(model, dataset, wanted=wanted, batch_size=batch_size, workers=workers)
    batches: ImageBatches = loader.dataset  # type: ignore[assignment]
    source = batches.source
    device = next(model.parameters()).device
    clock = device_clock(device)
    sums = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, loss, share
    moh = False
    right = torch.zeros(len(source.classes), dtype=torch.int64)
    counted = torch.zeros_like(right)
    times: list[tuple[int, float]] = []
    with evaluating(model):
        for images, labels in readable_batches(loader, desc="evaluation", progress=progress):
            images, labels = images.to(device), labels.to(device)
            with record_routing(model) as routing:
                start = clock()
                logits = logits_of(model, images).float()  # [B, K]
                times.append((len(images), clock() - start))
            moh = bool(len(routing))
            first, fifth = accuracy(logits, labels, topk=(1, 5))  # type: ignore[no-untyped-call]
            loss = F.cross_entropy(logits, labels)
            means = [float(first), float(fifth), float(loss), routing.share() if moh else 0.0]
            sums += len(images) * torch.tensor(means, dtype=torch.float64)
            counted += labels.cpu().bincount(minlength=len(counted))
            right += labels[logits.argmax(-1) == labels].cpu().bincount(minlength=len(counted))
    skipped = report_damaged(source, batches.damaged, what="skipped")
    if not times:
        raise ValueError(f"none of the {len(source.labels)} images can be read")
    top1, top5, loss_mean, share = (sums / counted.sum()).tolist()
    return ImageEvaluation(
        top1=top1,
        top5=top5,
        loss=loss_mean,
        per_class=_per_class(source.classes, right, counted),
        images=int(counted.sum()),
        skipped=skipped,
        images_per_second=_rate(times),
        share=share if moh else None,
    )


def _per_class(classes: Sequence[str], right: Tensor, counted: Tensor) -> dict[str, float | None]:
    pairs = zip(right.tolist(), counted.tolist(), strict=True)
    return {name: 100 * r / n if n else None for name, (r, n) in zip(classes, pairs, strict=True)}


def _rate(times: list[tuple[int, float]]) -> float:
    """Images per second; the first pass, which prepares the kernels, is left out unless it is the only one."""
    timed = times[1:] or times
    return sum(images for images, _ in timed) / max(sum(seconds for _, seconds in timed), 1e-9)


def image_loader(
    model: nn.Module,
    dataset: ImageSource,
    *,
    wanted: ImageInput | ProcessorInput | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """All images in their order, as the model expects them, with its numbering of the classes.

    Raises:
        ValueError: the images' classes are not the model's, there are no images, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(dataset.labels):
        raise ValueError("dataset must hold at least one image, got none")
    names = class_names(model)
    if names is not None:
        dataset = with_classes(dataset, names, what="the images", than="the model")
    elif num_classes(model) != len(dataset.classes):
        raise ValueError(
            f"the images must have the {num_classes(model)} classes of the model, but have {len(dataset.classes)}"
        )
    batches = ImageBatches(dataset, image_input(model) if wanted is None else wanted)
    return DataLoader(batches, batch_size=batch_size, collate_fn=take, num_workers=workers)
