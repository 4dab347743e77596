"""The sizes of a TransNeXt with MoH attention: widths, heads, depths, strides, and which images they allow.

Plain data without torch, validated once, at construction. Named sizes are in `presets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moh.config import MoHConfig

Size = tuple[int, int]
"""Height and width, of an image in pixels or of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the stages; sequences have one entry per stage.

    A stage whose entry in `sr_ratios` is 1 has plain attention, the others aggregated attention: a window of
    neighbours together with keys that are each pooled from `ratio x ratio` tokens.

    Args:
        img_size: height and width (or one number for both) of the images that the weights are trained on: the unit of
            relative positions. Any other size that the strides allow works at forward time.
        patch_size: stride of the first patch embedding; those between the stages have stride 2.
        embed_dims: widths.
        num_heads: h.
        depths: numbers of blocks.
        mlp_ratios: a plain MLP's hidden width over that of the stage; the gated one's is two thirds of it.
        sr_ratios: tokens along each axis that one pooled key stands for.
        shared_heads: h_s, a number or indices (see `moh.MoHConfig`); None makes every layer dense, without a router.
        active_heads: k, routed heads active per token; None together with `shared_heads`.
        window_size: width of the local window, odd.
        qkv_bias: biases of the query, key and value projections.
        norm_eps: epsilon of the norms of blocks and stages.

    Raises:
        ValueError: a field is out of range or does not match another; names it.
    """

    img_size: int | Sequence[int] = 224
    patch_size: int = 4
    embed_dims: Sequence[int]
    num_heads: Sequence[int]
    depths: Sequence[int]
    mlp_ratios: Sequence[float]
    sr_ratios: Sequence[int]
    shared_heads: Sequence[int | Sequence[int]] | None = None
    active_heads: Sequence[int] | None = None
    window_size: int = 3
    qkv_bias: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("num_heads", "depths", "mlp_ratios", "sr_ratios", "shared_heads", "active_heads"):
            value = getattr(self, name)
            if value is not None and len(value) != self.stages:
                raise ValueError(
                    f"{name} must have one entry for each of embed_dims' {self.stages} stages, got {list(value)}"
                )
        if (self.shared_heads is None) != (self.active_heads is None):
            raise ValueError("shared_heads and active_heads must both be given, or neither for a dense model")
        for name in ("embed_dims", "num_heads", "depths", "sr_ratios"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1 everywhere, got {list(getattr(self, name))}")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims must be multiples of num_heads, got {dim} for {heads} heads")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if self.window_size < 1 or self.window_size % 2 == 0:
            raise ValueError(f"window_size must be odd and at least 1, got {self.window_size}")
        self.check_size(self.trained_size, name="img_size")
        for stage in range(self.stages):
            self.layer_config(stage)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.embed_dims)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels along each axis from one token to the next, for each stage."""
        return tuple(self.patch_size * 2**stage for stage in range(self.stages))

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this."""
        return math.lcm(*(stride * ratio for stride, ratio in zip(self.strides, self.sr_ratios, strict=True)))

    @property
    def trained_size(self) -> Size:
        """`img_size` as height and width."""
        if isinstance(self.img_size, int):
            return self.img_size, self.img_size
        if len(self.img_size) != 2:
            raise ValueError(f"img_size must be one number or height and width, got {list(self.img_size)}")
        return self.img_size[0], self.img_size[1]

    def layer_config(self, stage: int) -> MoHConfig | None:
        """Heads and routing of a stage's layers, None in a dense model."""
        if self.shared_heads is None or self.active_heads is None:
            return None
        return MoHConfig(self.num_heads[stage], self.shared_heads[stage], self.active_heads[stage])

    def check_size(self, size: Size, *, name: str) -> None:
        """Check that the strides and pools divide an image of this height and width.

        Raises:
            ValueError: the size is not a multiple of strides times pooling; names the multiple.
        """
        multiple = self.size_multiple
        if any(length < multiple or length % multiple for length in size):
            raise ValueError(
                f"{name}: height and width must be multiples of {multiple} (strides times pooling), "
                f"got {size[0]} x {size[1]}"
            )
