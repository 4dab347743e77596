"""Inputs in labelled groups, as batches that a model of any family can be run on and judged by.

Made by `text_groups`, `image_groups` and `diffusion_groups`; used by `groups` and `ablation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupBatch:
    """B inputs and what to do with them.

    Attributes:
        groups: `[B]` int64, the group of each input.
        units: `[B]` int64, what belongs together: passages of one text have one number. Tests exchange whole units.
        run: one forward pass over the batch.
        losses: the loss of each input, `[B]` float32, a forward pass of its own.
        counted: `[B, N]` bool, the tokens that count (padding does not); None counts all.
    """

    groups: Tensor
    units: Tensor
    run: Callable[[], object]
    losses: Callable[[], Tensor]
    counted: Tensor | None = None


@dataclass(frozen=True)
class GroupedInputs:
    """Inputs of G groups, read anew each time that `batches` is called.

    Attributes:
        names: of the groups.
        batches: all inputs, a batch at a time.
        count: how many batches there are.
    """

    names: tuple[str, ...]
    batches: Callable[[], Iterator[GroupBatch]]
    count: int

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("at least one group is needed, got none")
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"groups must have different names, got {twice!r} twice")
