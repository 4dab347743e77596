"""Block sizes, warps and pipeline stages of the Triton kernels, by the width of heads and the size of a number.

Chosen so that 16-bit kernels of width 64 and 128 spill no registers on sm_80, sm_90 and sm_100 (`report.py` tells), and
that shared memory fits; not by measurement, for no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program takes at a time.

    Attributes:
        rows: active rows, at least 16, as tensor cores want.
        keys: keys, likewise.
        warps: of 32 threads each.
        stages: loads under way at once.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three large kernels, and of the forward pass with few rows (decoding)."""

    forward: Tile
    rows: Tile
    keys: Tile
    decode: Tile


_WARPGROUPS = {  # sm_90 and sm_100: products by groups of four warps
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 4, 3)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
}
_WARPS = {  # the others: products by single warps, which keep their operands in registers
    64: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 4, 3)),
    128: Tiles(Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(16, 64, 4, 3)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
}
_32_BITS = {
    64: Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
    128: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 4, 1)),
    256: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

MAX_WIDTH = max(_32_BITS)


@torch.compiler.assume_constant_result
def major_of(device: torch.device) -> int:
    """Major compute capability of a GPU; for the interpreter, on the CPU, that with the smallest tiles."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def padded(width: int) -> int:
    """The width that a tile has: a power of 2, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def tiles(width: int, itemsize: int, major: int) -> Tiles:
    """The tiles for heads of this width (the larger of D and Dv, up to `MAX_WIDTH`).

    Args:
        width: of a head.
        itemsize: bytes per number, 2 or 4.
        major: of the GPU's compute capability, 9 for sm_90.
    """
    table = _32_BITS if itemsize == 4 else _WARPGROUPS if major in (9, 10) else _WARPS
    return table[max(64, padded(width))]
