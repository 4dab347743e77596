"""W_O for every number of heads in one model: each layer's own weight plus a low-rank change that depends on the number.

Fitted by `moh.conversion.budgets`, switched by the dial (`moh.models.budget`). Not trained: what is trained is the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moh.routing import Router


@dataclass(frozen=True)
class _Kept:
    """The weight as it is without a change, and how to tell that what was written on it is still there."""

    original: Tensor
    place: int
    version: int


class OutputBudgets(nn.Module):
    """The changes of one layer's output projection: `W_O(n) = W_O + left[n] @ right[n]` with n heads active.

    The projection's weight always holds the change that belongs to the router's number of heads, in memory and in a
    saved model. With all heads there is none; between two numbers that have a change the lower one's holds, below the
    lowest the lowest one's.

    Args:
        heads: numbers of heads, shared ones included, that have a change of their own; ascending, all below h.
        rank: of the changes.
        weight: the projection's, `[rows, columns]` in whatever order its module keeps it.

    Buffers: `left` `[len(heads), rows, rank]` and `right` `[len(heads), rank, columns]`, 0 until they are filled.
    """

    left: Tensor
    right: Tensor

    def __init__(self, heads: Sequence[int], rank: int, weight: Tensor) -> None:
        super().__init__()
        if rank < 1 or list(heads) != sorted(set(heads)) or not heads:
            raise ValueError(
                f"output_budgets must have a rank of at least 1 and ascending numbers of heads, got {rank}, {heads}"
            )
        self.heads = tuple(heads)
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.register_buffer("left", torch.zeros(len(heads), weight.shape[0], rank, **place))
        self.register_buffer("right", torch.zeros(len(heads), rank, weight.shape[1], **place))
        self._kept: _Kept | None = None

    def index(self, heads: int, num_heads: int) -> int | None:
        """Which change belongs to a number of heads; None for no change."""
        if heads >= num_heads:
            return None
        return max((i for i, n in enumerate(self.heads) if n <= heads), default=0)

    def switch(self, weight: Tensor, before: int | None, after: int | None) -> None:
        """Replace the change that a weight holds, in place.

        Args:
            weight: the projection's.
            before: index of the change that it holds.
            after: index of the one that it is to hold.
        """
        if before == after:
            return
        with torch.no_grad():
            kept = self._kept
            if kept is None or kept.place != weight.data_ptr() or kept.version != weight._version:
                # Trained or loaded since: what was kept is no longer what lies below
                original = weight.detach().clone() if before is None else self._with_change(weight, before, -1.0)
            else:
                original = kept.original
            weight.copy_(original if after is None else self._with_change(original, after, 1.0))
            # Adding and subtracting changes would lose bits with every turn of the dial
            self._kept = _Kept(original, weight.data_ptr(), weight._version)

    def _with_change(self, weight: Tensor, index: int, factor: float) -> Tensor:
        change = self.left[index].float() @ self.right[index].float()
        return (weight.detach().float() + factor * change).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"heads={list(self.heads)}, rank={self.left.shape[-1]}"


def output_projection(attention: nn.Module) -> Any:
    """The module that holds a MoH attention layer's W_O; below an adapter, its base."""
    family = getattr(attention, "family", None)  # of `moh.models.families`, whose table says where it is
    module: Any = attention
    for name in (family.output if family is not None else "o_proj").split("."):
        module = getattr(module, name)
    return getattr(module, "base_layer", module)


def routed_attentions(model: nn.Module) -> list[nn.Module]:
    """The attention layers of a model that have a router, in its order."""
    return [module for module in model.modules() if isinstance(module._modules.get("router"), Router)]


def add_output_budgets(model: nn.Module) -> None:
    """Give the attention layers the changes that the model's configuration names, where they have none yet.

    `config.output_budgets` is None or `{"heads": [...], "rank": r}`.
    """
    wanted = getattr(model.config, "output_budgets", None)
    if wanted is None:
        return
    for attention in routed_attentions(model):
        if not hasattr(attention, "output_budgets"):
            weight = output_projection(attention).weight
            attention.output_budgets = OutputBudgets(wanted["heads"], wanted["rank"], weight)


def switches(model: nn.Module, routers: Sequence[Router], counts: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """What `OutputBudgets.switch` has to do for new numbers of active routed heads: (budgets, weight, before, after).

    Raises:
        ValueError: a weight can't be changed, because it is quantised.
    """
    new = dict(zip(routers, counts, strict=True))
    for attention in routed_attentions(model):
        budgets, router = getattr(attention, "output_budgets", None), attention.router
        if not isinstance(budgets, OutputBudgets):
            continue
        weight, config = output_projection(attention).weight, router.config
        before, after = (
            budgets.index(config.num_shared + k, config.num_heads) for k in (config.active_heads, new[router])
        )
        if before != after and not weight.is_floating_point():
            raise ValueError(
                f"active_heads can't be changed: this model has a W_O for each number of heads, and its weights are "
                f"quantised ({weight.dtype}); turn the dial before quantising"
            )
        yield budgets, weight, before, after
