"""The sizes of a TransNeXt with MoH attention, which images they allow, and where tokens are in an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moh.attention.call import autocasts, transforms_are_active
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


COORDINATE_RANGE = 8.0
"""The offset across a whole training image; the logarithm maps it to about 1."""


def visible_neighbours(size: Size, window: int, device: torch.device) -> Tensor:
    """How many tokens of its window each token sees, `[N]` float32: fewer at the edges, as padding does not count."""
    rows, columns = (_visible_along(length, window, device) for length in size)
    return (rows[:, None] * columns).flatten()


def _visible_along(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    reach = window // 2
    last = (position + reach).clamp_max(length - 1)
    first = (position - reach).clamp_min(0)
    return (last - first + 1).float()


class PositionBias(nn.Module):
    """Position bias of every head for every (query, pooled key), from a small network on log-spaced relative coordinates.

    `bias = W_2 relu(W_1 c + b_1) + b_2` with `c = sign(d) log2(1 + |d|) / log2(8)` and d the offset from the key's
    centre to the query, in units in which a training image is 8 wide.

    Args:
        num_heads: H.
        ratio: tokens that one pooled key stands for, along each axis.
        trained_size: height and width of the training images, in tokens; the unit of the coordinates.
        hidden: width of the network.

    In evaluation without gradients the bias of the last size is cached until the weights change; the cache is not in the
    state dict.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        ratio: int,
        trained_size: Size,
        hidden: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ratio = ratio
        self.trained_size = trained_size
        self.fc1 = nn.Linear(2, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_heads, device=device, dtype=dtype)
        self._kept: tuple[object, Tensor] | None = None

    def forward(self, size: Size) -> Tensor:
        """`[H, N, P]` for `size = (height, width)` with N = height * width queries and P = N / ratio^2 pooled keys."""
        if not self._may_keep():
            if not torch.compiler.is_compiling():
                self._kept = None  # fused optimisers change weights without raising their version
            return self._compute(size)
        key = (size, autocasts(self.fc1.weight), *self._fingerprint())
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._compute(size))
        return self._kept[1]

    def _may_keep(self) -> bool:
        """Whether the bias may be cached: the weights are not being trained, and a version counter shows their changes."""
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or transforms_are_active()
            or any(p.is_inference() for p in self.parameters())
        )

    def _fingerprint(self) -> list[object]:
        return [(p.data_ptr(), p._version, p.dtype, p.device) for p in self.parameters()]

    def train(self, mode: bool = True) -> Self:
        self._kept = None  # what is cached may be older than the last step
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None  # another device or dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _compute(self, size: Size) -> Tensor:
        device, dtype = self.fc1.weight.device, self.fc1.weight.dtype
        down, across = (self._coordinates(size[axis], self.trained_size[axis], device) for axis in (0, 1))
        table = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).to(dtype)  # [Th, Tw, 2]
        table = self.fc2(F.relu(self.fc1(table)))  # [Th, Tw, H]
        rows, columns = (self._offsets(length, device) for length in size)  # [height, pooled height], likewise
        index = rows[:, None, :, None] * across.shape[0] + columns[None, :, None, :]
        index = index.flatten(2).flatten(0, 1)  # [N, P]
        return F.embedding(index, table.flatten(0, 1)).permute(2, 0, 1)  # [H, N, P]

    def _offsets(self, length: int, device: torch.device) -> Tensor:
        """Along one axis: which entry of the table belongs to each (query, pooled key), `[length, length / ratio]`."""
        query = torch.arange(length, device=device)
        key = torch.arange(length // self.ratio, device=device)
        return query[:, None] - self.ratio * key + self.ratio * (len(key) - 1)

    def _coordinates(self, length: int, trained: int, device: torch.device) -> Tensor:
        """Along one axis: the coordinate of every entry of the table, ascending."""
        pooled = length // self.ratio
        first = -self.ratio * (pooled - 1)
        # a key's centre is (ratio - 1) / 2 beyond the first of its tokens
        offset = torch.arange(first, length, device=device, dtype=torch.float32) - (self.ratio - 1) / 2
        distance = offset * (COORDINATE_RANGE / max(trained - 1, 1))
        return distance.sign() * (distance.abs() + 1).log2() / math.log2(COORDINATE_RANGE)
