"""The load-balance loss in the gradient of a loss that doesn't contain it, as of a training loop that doesn't know about it.

What a layer or a model returns passes through unchanged; in the backward pass the balance loss's gradient joins that of
whatever was computed from it. A loss that has a balance loss of its own gets no second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from moh.routing.router import Router

_scale: float | Tensor | None = None  # not a ContextVar, which torch.compile can't read in torch 2.11


@dataclass(eq=False)
class Balance:
    """What the routers of one model share: the weight of its balance loss, the mean over the layers that route.

    Attributes:
        coefficient: beta, weight of the balance loss; 0 attaches nothing.
        layers: how many of the model's layers route.
    """

    coefficient: float = 0.0
    layers: int = 1

    @property
    def weight(self) -> float:
        """Weight of one layer's balance loss."""
        return self.coefficient / self.layers


def attach_to_layers(routers: Iterable[Router], coefficient: float) -> None:
    """Attach the balance loss of these layers, all of one model, to whatever is trained on their heads.

    In training each layer's gates then carry the gradient of `coefficient / layers` times its balance loss.

    Args:
        routers: of all layers of the model.
        coefficient: beta, 0 to attach nothing.

    Raises:
        ValueError: the coefficient is below 0, or above it without a router.
    """
    if coefficient < 0:
        raise ValueError(f"router_aux_loss_coef must be at least 0, got {coefficient}")
    routers = list(routers)
    if coefficient and not routers:
        raise ValueError(f"router_aux_loss_coef must be 0 for a model without routed heads, got {coefficient}")
    balance = Balance(coefficient)
    for router in routers:
        router.balance = balance
    count_layers(routers)


def count_layers(routers: Iterable[Router]) -> None:
    """Count the layers that route again, for each model that the routers belong to."""
    routers = list(routers)
    for balance in {id(router.balance): router.balance for router in routers}.values():
        routing = sum(router.config.active_heads > 0 for router in routers if router.balance is balance)
        balance.layers = max(1, routing)


@contextmanager
def loss_scale(scale: float | Tensor) -> Iterator[None]:
    """State by how much a training loop multiplies its loss, for models that add their balance loss to its gradient.

    A model with `router_aux_loss_coef` above 0 can't see what happens to the loss between its outputs and `backward()`.
    The gradient of the balance loss is multiplied by `scale` too, so that a `GradScaler` or a division by the number of
    accumulated batches leaves their ratio as it is. A balance loss that is part of the loss itself needs no such block.

    Args:
        scale: the factor, such as `scaler.get_scale() / accumulated_batches`. The block must hold the forward pass, and
            with reentrant gradient checkpointing the backward pass too.

    Examples:
        >>> with moh.loss_scale(scaler.get_scale() / 4):  # doctest: +SKIP
        ...     scaler.scale(criterion(model(images), labels) / 4).backward()
    """
    global _scale
    before, _scale = _scale, scale
    try:
        yield
    finally:
        _scale = before


def attach(
    balance: Tensor,
    weight: float,
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor] = (),
    items: Tensor | int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Put the balance loss into the graph of outputs; returns all three as parts of that graph.

    Args:
        balance: the balance loss, a scalar.
        weight: its weight, next to a mean over the tokens of the call.
        outputs: tensors that a loss is computed from.
        sources: tensors that a balance loss of somebody else is computed from (and `balance` itself): if such a loss has
            a part in the loss, it counts and this one doesn't.
        items: the number of labels of an optimiser step if that is what the loss is divided by.

    Raises:
        RuntimeError: in the backward pass, under float16 autocast, where a `GradScaler` multiplies the loss: the loss has
            no balance loss of its own, and no `loss_scale` states the factor.
    """
    device = balance.device.type
    is_half = (
        not balance.is_meta and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    )
    scaled, factor = _scale is not None, 1.0 if _scale is None else _scale
    settings = (len(outputs), weight, factor, is_half and not scaled, items)
    balance, *attached = _Attached.apply(settings, balance, *outputs, *sources)
    return balance, tuple(attached[: len(outputs)]), tuple(attached[len(outputs) :])


class _Attached(torch.autograd.Function):
    """Passes tensors through, and in the backward pass adds the gradient of the balance loss.

    Args:
        settings: number of outputs, weight, factor of the loss, whether that factor is unknown, `items`.
        balance: the balance loss.
        tensors: outputs, then sources.
    """

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], balance: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.count, ctx.weight, scale, ctx.is_unscaled, items = settings
        ctx.has_items = items is not None
        saved = [torch.as_tensor(items, device=balance.device)] if ctx.has_items else []
        ctx.save_for_backward(balance, torch.as_tensor(scale, dtype=balance.dtype, device=balance.device), *saved)
        # Detached and not viewed: what a function returns as a view can't be changed in place.
        return balance.detach(), *(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, of_balance: Tensor | None, *gradients: Tensor | None) -> tuple[Any, ...]:
        balance, scale, *items = ctx.saved_tensors
        of_outputs, of_sources = gradients[: ctx.count], gradients[ctx.count :]
        own = [used for used in (of_balance, *of_sources) if used is not None]
        if ctx.is_unscaled and not own:
            raise RuntimeError(
                "the load-balance loss can't be added to a loss under float16 autocast, where a GradScaler multiplies the loss "
                "by a factor unknown here: run the step inside `with moh.loss_scale(scaler.get_scale())` (1 without a "
                "scaler), add the balance loss to the loss, use bfloat16, or router_aux_loss_coef=0"
            )
        added = ctx.weight * scale
        of_first = next((g for g in of_outputs if g is not None), None)
        if ctx.has_items and of_first is not None:
            # A token without a label has no gradient. Trainers multiply such a loss by the number of processes, whose
            # gradients are then averaged.
            labels = (torch.linalg.vector_norm(of_first, torch.inf, dim=-1) > 0).sum().to(balance.device)
            added = added * labels * _processes() / items[0]
        # A loss that has a balance loss of its own gets no second one. A compiled graph gives 0 for what is not used.
        for used in own:
            added = torch.where((used != 0).any().to(balance.device), 0.0, added)
        return None, added if of_balance is None else of_balance + added, *gradients


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
