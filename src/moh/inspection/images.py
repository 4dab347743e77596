"""Groups of images for a classifier: one group per class. Extra `vision`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moh.data.images.augmentation import ProcessorInput
from moh.data.images.batches import ImageBatches, readable_batches, report_damaged
from moh.data.images.recipe import ImageInput
from moh.data.images.sources import ImageSource
from moh.evaluation.images import image_loader
from moh.inspection.inputs import GroupBatch, GroupedInputs
from moh.models.classifiers import logits_of


def image_groups(
    model: nn.Module,
    dataset: ImageSource,
    *,
    wanted: ImageInput | ProcessorInput | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> GroupedInputs:
    """The images of each class; each image is a unit. Damaged ones are left out, with a warning at the end.

    Args:
        model: of timm or transformers, MoH or dense.
        dataset: labelled images, with the model's classes in any order.
        wanted: the model's expected input; None takes it from the model (`moh.models.classifiers.image_input`).
        batch_size: images per forward pass.
        workers: processes that load images; 0 loads them here.

    Raises:
        ValueError: the images' classes are not the model's, there are no images, or `batch_size` is below 1.
    """
    loader = image_loader(model, dataset, wanted=wanted, batch_size=batch_size, workers=workers)
    images: ImageBatches = loader.dataset  # type: ignore[assignment]
    device = next(model.parameters()).device

    def batches() -> Iterator[GroupBatch]:
        seen = 0
        for pixels, labels in readable_batches(loader, desc="images", progress=False):
            units = torch.arange(seen, seen + len(labels))
            seen += len(labels)
            yield _batch(model, pixels.to(device), labels, units)
        report_damaged(images.source, images.damaged, what="skipped")

    return GroupedInputs(tuple(images.source.classes), batches, len(loader))


def _batch(model: nn.Module, pixels: Tensor, labels: Tensor, units: Tensor) -> GroupBatch:
    def losses() -> Tensor:
        return F.cross_entropy(logits_of(model, pixels).float(), labels.to(pixels.device), reduction="none")

    return GroupBatch(groups=labels, units=units, run=lambda: model(pixels), losses=losses)
