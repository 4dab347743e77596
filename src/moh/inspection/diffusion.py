"""Groups for a diffusion model: noisy images by ranges of time steps, or by class. Extra `diffusion`.

Noise and time steps are drawn from the seed and the image's number, the same for every batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from moh.data.images.sources import ImageSource, with_classes
from moh.data.seeds import generator_of
from moh.inspection.inputs import GroupBatch, GroupedInputs
from moh.sampling.checkpoint import ImageModel
from moh.training.diffusion.data import PixelDataset, to_float
from moh.training.diffusion.loss import add_noise, hybrid_loss

By = Literal["timestep", "class"]


def diffusion_groups(
    model: ImageModel,
    dataset: ImageSource,
    *,
    by: By = "timestep",
    bins: int = 10,
    seed: int = 0,
    batch_size: int = 32,
) -> GroupedInputs:
    """Noisy images, each at one time step; each image is a unit. The model gets the image's class.

    Args:
        model: MoH or dense.
        dataset: labelled images; classes in the model's order, or with the same names in any order.
        by: "timestep": one group per range of time steps. "class": one group per class.
        bins: number of equal ranges of time steps, over which each class's images are spread in turn, whatever `by` is.
        seed: seed of noise and time steps.
        batch_size: images per forward pass.

    Raises:
        ValueError: the images' classes or channels are not the model's, there are none, or a number is out of range.
    """
    steps = int(model.scheduler.config["num_train_timesteps"])
    if by not in ("timestep", "class"):
        raise ValueError(f"by must be 'timestep' or 'class', got {by!r}")
    if not 1 <= bins <= steps:
        raise ValueError(f"bins must be between 1 and the {steps} steps of the diffusion, got {bins}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.class_names:
        dataset = with_classes(dataset, model.class_names, what="the images", than="the model")
    elif len(dataset.classes) != model.num_classes:
        raise ValueError(
            f"the images must have the {model.num_classes} classes of the model, got {len(dataset.classes)}"
        )
    if not len(dataset.labels):
        raise ValueError("dataset must hold at least one image, got none")
    pixels = PixelDataset(dataset, _image_size(model))
    if model.vae is None and pixels.sample_shape[0] != model.sample_shape[0]:
        raise ValueError(
            f"the images must have the {model.sample_shape[0]} channels of the model, got {pixels.sample_shape[0]}"
        )
    edges = [steps * place // bins for place in range(bins + 1)]
    ranges = _deal(dataset.labels, bins)
    starts = range(0, len(pixels), batch_size)

    def batches() -> Iterator[GroupBatch]:
        for start in starts:
            indices = list(range(start, min(start + batch_size, len(pixels))))
            batch = pixels.__getitems__(indices)
            clean = _encode(model, batch["pixels"])
            noise, t = _draw(model, indices, ranges[indices].tolist(), edges, seed)
            groups = ranges[indices] if by == "timestep" else batch["labels"]
            yield _batch(model, clean, noise, t, batch["labels"], groups, torch.tensor(indices))

    names = tuple(f"t {low}-{high - 1}" for low, high in pairwise(edges))
    return GroupedInputs(names if by == "timestep" else tuple(dataset.classes), batches, len(starts))


def _batch(
    model: ImageModel, clean: Tensor, noise: Tensor, t: Tensor, labels: Tensor, groups: Tensor, units: Tensor
) -> GroupBatch:
    noisy = add_noise(clean, noise, t, model.scheduler)
    labels = labels.to(clean.device)

    def run() -> Tensor:
        output: Tensor = model.transformer(noisy, timestep=t, class_labels=labels).sample
        return output

    def losses() -> Tensor:
        output = run()
        if model.learns_variance:
            return hybrid_loss(output, clean, noisy, noise, t, model.scheduler).loss
        return (output.float() - noise).square().flatten(1).mean(1)

    return GroupBatch(groups=groups, units=units, run=run, losses=losses)


def _deal(labels: Tensor, bins: int) -> Tensor:
    """The range of time steps of each image, `[n]`: in turn over the images of each class, whatever their order."""
    ranges = torch.empty_like(labels)
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        # + label: otherwise classes of few images would all get the first ranges
        ranges[places] = (torch.arange(len(places)) + label) % bins
    return ranges


def _draw(
    model: ImageModel, indices: list[int], ranges: list[int], edges: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Noise `[B, C, h, w]` and time steps `[B]` within each image's range."""
    noise, t = torch.empty(len(indices), *model.sample_shape), torch.empty(len(indices), dtype=torch.int64)
    for row, (index, place) in enumerate(zip(indices, ranges, strict=True)):
        generator = generator_of(seed, 0, index)
        t[row].random_(edges[place], edges[place + 1], generator=generator)
        noise[row].normal_(generator=generator)
    return noise.to(model.device), t.to(model.device)


@torch.no_grad()
def _encode(model: ImageModel, pixels: Tensor) -> Tensor:
    """What the model denoises, from uint8 pixels: values in -1..1, or the means of their latents."""
    x = to_float(pixels).to(model.device)
    if model.vae is None:
        return x
    mean: Tensor = model.vae.encode(x).latent_dist.mode()
    shift, scale = model.vae.config.shift_factor or 0.0, float(model.vae.config.scaling_factor)
    return (mean - shift) * scale


def _image_size(model: ImageModel) -> int:
    """Height and width of the images whose pixels or latents the model denoises."""
    scale = 1 if model.vae is None else 2 ** (len(model.vae.config.block_out_channels) - 1)
    return model.sample_shape[1] * scale
