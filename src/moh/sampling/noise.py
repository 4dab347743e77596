"""Random numbers that belong to one image, whoever computes it: a generator per image, seeded from integers.

Not for layers' randomness (dropout): that is torch's global generator.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """A seed for `numbers`; two lists that differ in one number alone, by less than 2^32, have different seeds.

    torch's CPU generators use the low 32 bits of a seed, so that (seed, index) has to be mixed into as many.
    """
    return zlib.crc32(struct.pack(f"<{len(numbers)}q", *numbers))


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator for each image of `indices`, as diffusers' schedulers take them."""
    return [torch.Generator().manual_seed(seed_of(seed, index)) for index in indices]


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """`[len(generators), *shape]` float32, each image's from its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
