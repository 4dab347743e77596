"""W_O for every number of heads in one model: each layer's own weight plus a low-rank change that depends on the number.

Fitted by `moh.conversion.calibrator`, switched by the dial (`moh.models.dial`). Training changes the weight, never the changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moh.attention.projections import is_wrapper
from moh.config import MoHConfig
from moh.routing import Router


class OutputChanges(nn.Module):
    """The changes of one layer's output projection: `W_O(n) = W_O + left[n] @ right[n]` with n heads active.

    The projection's weight always holds the change that belongs to the router's number of heads, in memory and in a
    saved model. With all heads there is none; a number without its own uses that of the next lower one, below the
    lowest that of the lowest.

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
                f"output_changes must have a rank of at least 1 and ascending numbers of heads, got {rank}, {heads}"
            )
        self.heads = tuple(heads)
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.register_buffer("left", torch.zeros(len(heads), weight.shape[0], rank, **place))
        self.register_buffer("right", torch.zeros(len(heads), rank, weight.shape[1], **place))
        self._original: Tensor | None = None  # the weight without a change, as of the dial's last turn

    def index(self, heads: int, num_heads: int) -> int | None:
        """Index of the change for a number of heads; None for no change."""
        if heads >= num_heads:
            return None
        return max((i for i, n in enumerate(self.heads) if n <= heads), default=0)

    def switch(self, weight: Tensor, before: int | None, after: int | None) -> None:
        """Replace the change that a weight holds, in place.

        Args:
            weight: the projection's.
            before: index of the change that it holds.
            after: index of the one that replaces it.
        """
        if before == after:
            return
        with torch.no_grad():
            original = self._original  # adding and subtracting changes would lose bits with every turn of the dial
            if original is None or not self._holds(weight, original, before):
                original = weight.detach().clone() if before is None else self._with_change(weight, before, -1.0)
            weight.copy_(self._changed(original, after))
            self._original = original

    def _holds(self, weight: Tensor, original: Tensor, index: int | None) -> bool:
        """Whether a weight still is what the dial made of `original`: not trained, merged, loaded or moved since.

        Decided by the values: fused optimisers and merged adapters change them without raising the weight's version.
        """
        if (original.device, original.dtype, original.shape) != (weight.device, weight.dtype, weight.shape):
            return False
        return torch.equal(weight, self._changed(original, index))

    def _changed(self, original: Tensor, index: int | None) -> Tensor:
        return original if index is None else self._with_change(original, index, 1.0)

    def _with_change(self, weight: Tensor, index: int, factor: float) -> Tensor:
        change = self.left[index].float() @ self.right[index].float()
        return (weight.detach().float() + factor * change).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"heads={list(self.heads)}, rank={self.left.shape[-1]}"


def output_projection(attention: nn.Module) -> Any:
    """The module that holds a MoH attention layer's W_O; below an adapter, its base."""
    # Families of `moh.models.transformers` have their own names for it
    module: Any = attention.output_projection if hasattr(attention, "output_projection") else attention.o_proj
    return getattr(module, "base_layer", module)


def routed_attentions(model: nn.Module) -> list[Any]:
    """The attention layers of a model that have a router, in its order."""
    return [module for module in model.modules() if isinstance(module._modules.get("router"), Router)]


def quantised(weight: Any) -> str | None:
    """What kind of quantised weight this is; None for a plain one, whose values can be read and changed."""
    if not isinstance(weight, Tensor):
        return "packed"  # a module of PyTorch's dynamic quantisation has a method of this name
    if not weight.is_floating_point():
        return str(weight.dtype)
    if not is_wrapper(weight):
        return None
    from torch.distributed.tensor import DTensor  # slow to import

    return None if isinstance(weight, DTensor) else type(weight).__name__


def used_heads(layers: Iterable[MoHConfig]) -> list[int]:
    """Heads that a token uses in each layer, shared ones included."""
    return [layer.num_shared + layer.active_heads for layer in layers]


def add_output_changes(model: nn.Module) -> None:
    """Give the attention layers the changes that the model's configuration names, where they have none yet.

    `config.output_changes` is None or `{"heads": [...], "rank": r, "used_heads": [...]}`; the last are the numbers of
    heads, one per layer, whose changes the saved weights hold.

    Raises:
        ValueError: the configuration's heads differ from those.
    """
    wanted = getattr(model.config, "output_changes", None)
    attentions = routed_attentions(model)
    if wanted is None or not attentions:  # none: a family's model whose routers come later
        return
    used = used_heads(attention.router.config for attention in attentions)
    if used != wanted["used_heads"]:
        raise ValueError(
            "active_heads and shared_heads must be those that the model was saved with, because its W_O is for these "
            f"({wanted['used_heads']} heads per layer), got {used} heads per layer: load the model without them, then turn "
            "the dial (moh.set_active_heads)"
        )
    for attention in attentions:
        if not hasattr(attention, "output_changes"):
            weight = output_projection(attention).weight
            attention.output_changes = OutputChanges(wanted["heads"], wanted["rank"], weight)


def switches(model: nn.Module, routers: Sequence[Router], counts: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """What `OutputChanges.switch` has to do for new numbers of active routed heads: (changes, weight, before, after).

    Raises:
        ValueError: a weight can't be changed, because it is quantised.
    """
    new = dict(zip(routers, counts, strict=True))
    for attention in routed_attentions(model):
        changes, router = getattr(attention, "output_changes", None), attention.router
        if not isinstance(changes, OutputChanges):
            continue
        weight, config = output_projection(attention).weight, router.config
        before, after = (
            changes.index(config.num_shared + k, config.num_heads) for k in (config.active_heads, new[router])
        )
        if before != after and (kind := quantised(weight)) is not None:
            raise ValueError(
                f"active_heads can't be changed: this model has a W_O for each number of heads, and its weights are "
                f"quantised ({kind}); turn the dial before quantising"
            )
        yield changes, weight, before, after
