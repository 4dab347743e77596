"""Counting, in constant memory, how many tokens activate each head: per layer, and per group of sequences if asked.

What the groups are (one for a text, the classes for images) is the business of `load` and `class_load`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.routing import record_routing


class HeadCounter:
    """Adds up the routing of a model's forward passes.

    Args:
        model: with MoH layers.
        groups: G, number of groups.
    """

    def __init__(self, model: nn.Module, groups: int = 1) -> None:
        self.model = model
        self.groups = groups
        self.layers: list[MoHConfig] = []
        self._active: list[Tensor] = []  # per layer [G, H]
        self._tokens: list[Tensor] = []  # per layer [G]

    @contextmanager
    def counting(self, group: Tensor | None = None) -> Iterator[None]:
        """Count what runs in the block.

        Args:
            group: `[B]` int64, the group of each sequence; None puts all in the first.

        Raises:
            ValueError: the model has no MoH layers.
        """
        with record_routing(self.model) as routing:
            yield
        if not len(routing):
            raise ValueError("model has no MoH layers: a dense model uses every head for every token")
        if not self.layers:
            self.layers = [info.config for _, info in routing]
            self._active = [torch.zeros(self.groups, c.num_heads, dtype=torch.float64) for c in self.layers]
            self._tokens = [torch.zeros(self.groups, dtype=torch.float64) for _ in self.layers]
        for (_, info), active, tokens in zip(routing, self._active, self._tokens, strict=True):
            counts = info.active.sum(1).double().cpu()  # [B, H]
            place = torch.zeros(len(counts), dtype=torch.int64) if group is None else group
            active.index_add_(0, place, counts)
            tokens.index_add_(0, place, torch.full((len(counts),), info.gates.shape[1], dtype=torch.float64))

    @property
    def load(self) -> list[Tensor]:
        """Per layer `[G, H]` float64: share of a group's tokens that activate each head; NaN for an empty group."""
        return [active / tokens[:, None] for active, tokens in zip(self._active, self._tokens, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens that the first layer counted."""
        return int(self._tokens[0].sum()) if self._tokens else 0


def stack_layers(rows: list[Tensor]) -> Tensor:
    """`[L, H]`, from one `[H_l]` per layer; NaN beyond a layer's own heads where others have more."""
    stacked = torch.full((len(rows), max(map(len, rows))), torch.nan, dtype=torch.float64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked
