"""Which heads each class of images uses: head load per class and layer (the paper's figure "head load per class").

Pictures are in `class_plots`. Not for texts: see `load`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.inspection.counting import HeadCounter, stack_layers
from moh.inspection.load import HeadLoad
from moh.inspection.tables import save_rows
from moh.models.image_loading import ImageInput
from moh.training.images.batches import ImageBatches, image_loader, readable_batches, report_damaged
from moh.training.images.sources import ImageSource


@dataclass(frozen=True)
class ClassHeadLoad:
    """Loads of all heads of a model, class by class.

    Attributes:
        classes: K names.
        load: per layer `[K, H]` float64, the share of a class's tokens that activate each head (1 for shared heads); NaN
            for a class without images. Layers may differ in H.
        layers: heads and routing of each layer.
        images: `[K]` int64, images counted.
        tokens: tokens that the first layer counted.
        skipped: names of the images that could not be read.
    """

    classes: tuple[str, ...]
    load: list[Tensor]
    layers: list[MoHConfig]
    images: Tensor
    tokens: int
    skipped: tuple[str, ...] = ()

    def mean(self) -> HeadLoad:
        """Mean over the classes that have images, each with the same weight."""
        return HeadLoad(stack_layers([load.nanmean(0) for load in self.load]), self.layers, self.tokens)

    def rows(self) -> list[dict[str, int | float | str]]:
        """One row per class, layer and head: class, layer, head, kind ("shared" or "routed"), load."""
        return [
            {
                "class": name,
                "layer": layer,
                "head": head,
                "kind": "shared" if head in config.shared_indices else "routed",
                "load": float(self.load[layer][place, head]),
            }
            for place, name in enumerate(self.classes)
            for layer, config in enumerate(self.layers)
            for head in range(config.num_heads)
            if self.images[place]  # a class without images has no load
        ]

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())

    def select(self, classes: Sequence[str]) -> ClassHeadLoad:
        """These classes alone, in this order.

        Raises:
            ValueError: one is unknown; names it.
        """
        for name in classes:
            if name not in self.classes:
                raise ValueError(f"classes must be among those of the model, got {name!r}")
        places = torch.tensor([self.classes.index(name) for name in classes], dtype=torch.int64)
        load = [layer[places] for layer in self.load]
        return dataclasses.replace(self, classes=tuple(classes), load=load, images=self.images[places])

    def distinctive(self, count: int) -> tuple[str, ...]:
        """The classes, in their order, whose loads differ most from the mean of all (root mean square over heads)."""
        gaps = torch.cat([load - load.nanmean(0) for load in self.load], dim=1)  # [K, heads of all layers]
        distance = gaps.square().mean(1).nan_to_num(-1.0)  # a class without images comes last
        places = distance.topk(min(count, int((self.images > 0).sum()))).indices.sort().values
        return tuple(self.classes[place] for place in places.tolist())


@torch.no_grad()
def class_head_load(
    model: nn.Module,
    dataset: ImageSource,
    *,
    wanted: ImageInput | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> ClassHeadLoad:
    """Count which heads the tokens of each class's images activate.

    Args:
        model: a timm model with MoH layers; used in evaluation mode and left in its own.
        dataset: labelled images, with the model's classes in any order.
        wanted: what the model wants to see; None takes what it says itself (`moh.models.image_loading.image_input`).
        batch_size: images per forward pass.
        workers: processes that load images; 0 loads them here.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: the model has no MoH layers, the images have other classes, or none can be read.
    """
    loader = image_loader(model, dataset, wanted=wanted, batch_size=batch_size, workers=workers)
    batches: ImageBatches = loader.dataset  # type: ignore[assignment]
    classes = batches.source.classes
    counter = HeadCounter(model, groups=len(classes))
    images = torch.zeros(len(classes), dtype=torch.int64)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for pixels, labels in readable_batches(loader, desc="head load", progress=progress):
            with counter.counting(labels):
                model(pixels.to(device))
            images += labels.bincount(minlength=len(classes))
    finally:
        model.train(training)
    skipped = report_damaged(batches.source, batches.damaged, what="skipped")
    if not counter.layers:
        raise ValueError(f"none of the {len(batches)} images can be read")
    return ClassHeadLoad(classes, counter.load, counter.layers, images, counter.tokens, skipped)
