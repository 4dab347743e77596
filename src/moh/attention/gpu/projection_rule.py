"""Whether a projection of active pairs alone is worth it on a GPU, told by counts: no GPU was at hand to measure.

docs/gpu.md has the counts. Not for what the kernels can serve at all (`moh.attention.projections`).
"""

from __future__ import annotations

import torch

from moh.attention.triton_kernels.projection_tiles import product_tile, relative_cost
from moh.attention.triton_kernels.projections import FEW_TOKENS

MAX_COST = 0.7
"""Of the dense product's cost by count: what is left is for a compiler that does less well than NVIDIA's library."""

MIN_TILES = 128
"""With fewer tiles than a large GPU has processors, of active pairs or of the weights' gradient, less work ends no sooner."""

MIN_BYTES = 2**24
"""With few tokens: weights that take less time to read than the launch of a kernel are not worth a choice."""


def dense_is_faster(
    *, tokens: int, heads: int, width: int, channels: int, share: float, dtype: torch.dtype, major: int
) -> str | None:
    """Why the dense product is expected to be as fast, or None.

    Args:
        tokens: of all sequences together.
        heads: H.
        width: D, of one head.
        channels: C, of the layer's input or output.
        share: expected share of (token, head) pairs that are active.
        dtype: of weights and inputs.
        major: of the GPU's compute capability.
    """
    # The words hold no number of tokens: torch.compile would fix it to read them.
    if dtype.itemsize != 2:
        return f"its {str(dtype).removeprefix('torch.')} tiles are small and meant for checks"
    if tokens <= FEW_TOKENS:
        if heads * width * channels * dtype.itemsize < MIN_BYTES:
            return f"its weights have less than {MIN_BYTES >> 20} MiB, and reading part of them saves too little"
        if 1 - (1 - share) ** tokens > MAX_COST:
            return f"so many tokens are expected to use more than {MAX_COST:.0%} of the heads"
        return None
    tile = product_tile(width, dtype.itemsize, major)
    cost = (share + tile.tall / 2 / tokens) * relative_cost(width, major)  # half a tile per head is empty
    if cost > MAX_COST:
        return f"by count it costs more than {MAX_COST} of the dense product"
    if min(tokens * share, channels) * heads * width < MIN_TILES * tile.tall * tile.wide:
        return f"it has fewer than {MIN_TILES} tiles of work, which leave a large GPU idle"
    return None
