"""Where tokens are in an image: how many neighbours a window holds, and the continuous position bias.

TransNeXt, arXiv 2311.17132, section 3. Everything is computed for the size at hand, so that images of other sizes than
in training work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moh.models.transnext.architecture import Size

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
        key = (size, torch.is_autocast_enabled(self.fc1.weight.device.type), *self._fingerprint())
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._compute(size))
        return self._kept[1]

    def _may_keep(self) -> bool:
        """Whether the bias may be cached: the weights are not being trained, and a version counter shows their changes."""
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
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
