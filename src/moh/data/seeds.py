"""Random numbers as a function of the position in a run (its seed, the step, the image), not of a generator's past.

A resumed run, or one with a different number of processes, therefore draws the same numbers. Two rules of mixing: 32 bits
for generators, which take no more (`seed_of`), and 64 bits for permutations, where two keys must not meet (`make_key`).
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK = (1 << 64) - 1


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits, which is all that torch's CPU generators use.

    Lists that differ in a single number, by less than 2^32, have different seeds.
    """
    return zlib.crc32(struct.pack(f"<{len(numbers)}q", *numbers))


def generator_of(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by `numbers`, such as a run's seed and an image's number."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def seed_all(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU) by integers; call it inside `generators_kept`."""
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (CPU) after the block."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def make_key(*numbers: int) -> int:
    """A key of 64 bits, for permutations; the same on every machine and with every release."""
    key = 0
    for number in numbers:
        key = mixed(key ^ (number & _MASK))
    return key


def mixed(value: int) -> int:
    """The finaliser of splitmix64: every bit of the value moves every bit of the result."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
