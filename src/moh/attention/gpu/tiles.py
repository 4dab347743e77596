"""Block sizes, warps and pipeline stages of the Triton kernels, by the width of heads and the size of a number.

Chosen so that 16-bit kernels of width 64 and 128 spill no registers on sm_80, sm_90 and sm_100 (`benchmarks/triton_report.py`
shows it), and that shared memory fits; not measured, as no GPU was at hand. The projections' tiles also by how much they
read compared to a dense product's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program takes at a time.

    Attributes:
        rows: active rows, at least 16, as tensor cores require.
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
    """Major compute capability of a GPU; for the interpreter, on the CPU, the one with the smallest tiles."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def padded(width: int) -> int:
    """The width of the tile: a power of 2, at least 16."""
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


DENSE_TILE = (128, 256)
"""Tile of cuBLAS's dense products, on the GPUs for which costs are counted."""


@dataclass(frozen=True)
class ProductTile:
    """What one program of a product takes at a time.

    Attributes:
        tall: tokens of `expand`, channels of `outer`.
        wide: numbers of a head.
        inner: what is summed over: channels of `expand`, tokens of `outer`.
        warps: of 32 threads each.
        stages: loads under way at once.
    """

    tall: int
    wide: int
    inner: int
    warps: int
    stages: int

    @property
    def chained_stages(self) -> int:
        """Stages where loads wait for others, as `outer`'s rows for their indices: each link of the chain takes its own."""
        return 2 * self.stages - 1


_PRODUCT_WARPGROUPS = {64: ProductTile(256, 64, 64, 8, 4), 128: ProductTile(256, 128, 64, 8, 3)}  # sm_90 and sm_100
_PRODUCT_WARPS = {
    64: ProductTile(256, 64, 32, 8, 4),
    128: ProductTile(256, 128, 32, 8, 4),
}  # within 99 KiB, as sm_86 has
_PRODUCT_32_BITS = {64: ProductTile(32, 64, 32, 4, 1), 128: ProductTile(32, 64, 32, 4, 1)}

FEW = ProductTile(16, 16, 256, 2, 4)
"""With few tokens the weights are read once and little else matters: many small programs with many loads under way."""

FEW_32_BITS = ProductTile(16, 16, 64, 2, 2)


def product_tile(width: int, itemsize: int, major: int) -> ProductTile:
    """The tile of `expand` and `outer` for heads of this width; wider heads are taken in slices.

    Args:
        width: D of a head.
        itemsize: bytes per number, 2 or 4.
        major: of the GPU's compute capability, 9 for sm_90.
    """
    table = _PRODUCT_32_BITS if itemsize == 4 else _PRODUCT_WARPGROUPS if major in (9, 10) else _PRODUCT_WARPS
    return table[min(max(64, padded(width)), 128)]


def relative_cost(width: int, major: int) -> float:
    """Cost of a (token, head) pair in our 16-bit tiles relative to a dense product's; at least 1.

    The larger of two counts: numbers read per multiplication, and multiplications including a head's padding.
    """
    tile = product_tile(width, 2, major)
    slices = -(-width // tile.wide)
    padding = slices * tile.wide / width
    read = 1 / tile.tall + slices / width  # a slice reads the tokens again
    dense = sum(1 / size for size in DENSE_TILE)
    return max(1.0, padding, read / dense)
