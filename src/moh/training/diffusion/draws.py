"""The random numbers of a training step, drawn for each image from the run's seed, the step and the image's number.

A resumed run thus repeats those of an uninterrupted one, and several processes draw those of one. Not for the order of
the images, which is the data loader's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moh.data.seeds import generator_of


@dataclass(frozen=True)
class Draws:
    """What is drawn for B images.

    Attributes:
        t: `[B]` int64, the time steps.
        noise: `[B, C, h, w]` float32, what is added to the images.
        mirrored: `[B]` bool.
        uniform: `[B]` float32 in 0..1, for dropping labels.
        latent: `[B, C, h, w]` float32, to draw latents of; None for pixels.
    """

    t: Tensor
    noise: Tensor
    mirrored: Tensor
    uniform: Tensor
    latent: Tensor | None


def draw(
    indices: Tensor,
    shape: tuple[int, ...],
    *,
    seed: int,
    step: int,
    train_steps: int,
    mirror: bool,
    latents: bool,
    device: torch.device,
) -> Draws:
    """Draw for the images `indices` `[B]` of one step.

    Args:
        indices: the images' numbers in the data set.
        shape: (C, h, w).
        seed: of the run.
        step: the optimiser step.
        train_steps: steps of the diffusion.
        mirror: mirror half of the images; False mirrors none.
        latents: draw noise for latents too.
        device: where the tensors go.
    """
    count = len(indices)
    noise = torch.empty(count, 2 if latents else 1, *shape)
    uniform = torch.empty(count, 2)
    t = torch.empty(count, dtype=torch.int64)
    for row, index in enumerate(indices.tolist()):
        generator = generator_of(seed, step, index)
        t[row].random_(train_steps, generator=generator)
        uniform[row].uniform_(generator=generator)
        noise[row].normal_(generator=generator)
    noise, uniform, t = (value.to(device, non_blocking=True) for value in (noise, uniform, t))
    return Draws(t, noise[:, 0], (uniform[:, 0] < 0.5) & mirror, uniform[:, 1], noise[:, 1] if latents else None)
