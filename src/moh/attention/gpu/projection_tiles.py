"""Block sizes of the projections' Triton kernels, and what their tiles read next to a dense product's.

Chosen by count and so that no kernel spills registers (`report.py` tells), not by measurement: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from moh.attention.triton_kernels.tiles import padded

DENSE_TILE = (128, 256)
"""What the dense products of NVIDIA's library take at once on the GPUs that they were counted for."""


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
        """Triton's stages where loads wait for others, as rows do for their places in `outer`: each link takes its own."""
        return 2 * self.stages - 1


_WARPGROUPS = {64: ProductTile(256, 64, 64, 8, 4), 128: ProductTile(256, 128, 64, 8, 3)}  # sm_90 and sm_100
_WARPS = {64: ProductTile(256, 64, 32, 8, 4), 128: ProductTile(256, 128, 32, 8, 4)}  # within 99 KiB, as sm_86 has
_32_BITS = {64: ProductTile(32, 64, 32, 4, 1), 128: ProductTile(32, 64, 32, 4, 1)}

FEW = ProductTile(16, 16, 256, 2, 4)
"""With few tokens the weights are read once and little else matters: many small programs with much under way."""

FEW_32_BITS = ProductTile(16, 16, 64, 2, 2)


def product_tile(width: int, itemsize: int, major: int) -> ProductTile:
    """The tile of `expand` and `outer` for heads of this width; wider ones than it are taken in slices.

    Args:
        width: D of a head.
        itemsize: bytes per number, 2 or 4.
        major: of the GPU's compute capability, 9 for sm_90.
    """
    table = _32_BITS if itemsize == 4 else _WARPGROUPS if major in (9, 10) else _WARPS
    return table[min(max(64, padded(width)), 128)]


def relative_cost(width: int, major: int) -> float:
    """What a (token, head) pair costs in 16-bit tiles, over its cost in a dense product's; at least 1.

    The larger of two counts: numbers that tiles read for each multiplication, and multiplications with a head's padding.
    """
    tile = product_tile(width, 2, major)
    slices = -(-width // tile.wide)
    padding = slices * tile.wide / width
    read = 1 / tile.tall + slices / width  # a slice reads the tokens again
    dense = sum(1 / size for size in DENSE_TILE)
    return max(1.0, padding, read / dense)
