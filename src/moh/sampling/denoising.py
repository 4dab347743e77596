"""From noise to images: the loop over a scheduler's steps, with checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moh.data.seeds import generator_of
from moh.models.diffusers import guided_output
from moh.sampling.checkpoint import ImageModel
from moh.sampling.schedulers import SamplingSettings, make_scheduler, takes_variance


def sample(
    model: ImageModel,
    labels: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Draw images of given classes.

    Args:
        model: as `load_image_model` reads it.
        labels: the class of each image.
        settings: how to draw; None takes the defaults.
        indices: the images' numbers; image i of a seed has the same noise whatever else is drawn. None counts from 0.
        batch_size: images at a time.

    Returns:
        `[len(labels), channels, height, width]` uint8 on the CPU.

    Raises:
        ValueError: a class, a setting or the batch size is out of range.
        RuntimeError: the model returned NaN or infinity; names the step and the images.
    """
    indices = range(len(labels)) if indices is None else indices
    if len(indices) != len(labels):
        raise ValueError(f"indices must have as many entries as labels, {len(labels)}, got {len(indices)}")
    if not labels:
        raise ValueError("labels must have at least one entry")
    batches = sample_batches(model, labels, settings or SamplingSettings(), indices=indices, batch_size=batch_size)
    return torch.cat([images for _, images in batches])


@torch.no_grad()
def sample_batches(
    model: ImageModel,
    labels: Sequence[int],
    settings: SamplingSettings,
    *,
    indices: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[slice, Tensor]]:
    """`sample`, batch by batch: yields (which of the labels, their images)."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    model.check_classes(labels)
    for start in range(0, len(labels), batch_size):
        part = slice(start, min(start + batch_size, len(labels)))
        clean = _denoise(model, labels[part], settings, indices[part])
        yield part, to_bytes(_finite(model.decode(clean), "after the last step", indices[part]))


def _denoise(model: ImageModel, labels: Sequence[int], settings: SamplingSettings, indices: Sequence[int]) -> Tensor:
    """The model's `[B, C, h, w]` float32 for images `indices`."""
    scheduler = make_scheduler(settings, model.scheduler.config, learned_variance=model.learns_variance)
    # One per image, as diffusers' schedulers take them
    generators = [generator_of(settings.seed, index) for index in indices]
    classes = torch.tensor(labels, device=model.device)
    x = torch.stack([torch.randn(model.sample_shape, generator=each) for each in generators])  # [B, C, h, w]
    x = x.to(model.device)
    for step, t in enumerate(scheduler.timesteps):
        output = guided_output(
            model.transformer,
            x,
            t,
            classes,
            guidance=settings.guidance,
            null_class=model.num_classes,
            guided_channels=settings.guided_channels,
        )
        # Checked before the step, because clipping would hide an infinity
        _finite(output, f"in step {step + 1} of {settings.steps} (t = {int(t)})", indices)
        if not takes_variance(scheduler):
            output = output[:, : x.shape[1]]
        x = scheduler.step(output, t, x, generator=generators).prev_sample
    return x


def to_bytes(images: Tensor) -> Tensor:
    """Images in -1..1, `[B, C, H, W]`, as uint8 on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _finite(x: Tensor, where: str, indices: Sequence[int]) -> Tensor:
    """Return `x`; raise a RuntimeError that names the images if it holds NaN or infinity."""
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        images = [indices[i] for i in bad.nonzero().flatten().tolist()]
        shown = ", ".join(map(str, images[:5])) + (", ..." if len(images) > 5 else "")
        raise RuntimeError(f"the model returned NaN or infinity {where}, for image {shown}")
    return x
