"""The load-balance loss of transformers models: in their loss, in their outputs, and in the gradient of any other loss.

As MoE models of transformers have it: `output_router_logits`, `outputs.router_logits`, `router_aux_loss_coef`,
`outputs.aux_loss`. A loss that is not the model's own, as of most trainers, gets the balance loss's gradient too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from moh.models.transformers.attention import RoutedAttention
from moh.models.transformers.families import PACKAGE
from moh.routing import RoutingInfo, record_routing
from moh.routing.attached import attach
from moh.routing.recording import RoutingRecord

_PART = "is_part_of_moh_model"
"""Argument by which a model lets its parts know that it looks after the balance loss itself."""


def with_balance_loss(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward` with the load-balance loss, its signature as before.

    With `config.router_aux_loss_coef` above 0 the balance loss is added to `outputs.loss` with that weight where labels are
    given. In training its gradient also joins the gradient of any other loss on the outputs, unless `outputs.aux_loss` or
    `outputs.router_logits` have a part in that loss. `outputs.aux_loss`, the loss without its weight, is given with that
    loss or with `output_router_logits` (argument or configuration), and with the latter also `outputs.router_logits`: for
    each layer that routes the logarithms of the routed heads' probabilities, `[B * N, config.num_experts]`.
    """
    names = [name for name in inspect.signature(dense_forward).parameters if name != "self"]

    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        wants_logits = kwargs.pop("output_router_logits", None)
        if kwargs.get(_PART):  # and so do its own parts
            return dense_forward(self, *args, **kwargs)
        if wants_logits is None:
            wants_logits = self.config.output_router_logits
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels, coefficient = given.get("labels"), self.config.router_aux_loss_coef
        has_loss = labels is not None or given.get("start_positions") is not None  # the latter in question answering
        kwargs["return_dict"] = True
        is_trained = self.training and torch.is_grad_enabled()
        if not wants_logits and (coefficient == 0 or not (has_loss or is_trained)):
            return dense_forward(self, *args, **kwargs)
        with record_routing(self.base_model) as routing:
            outputs = dense_forward(self, *args, **kwargs, **{_PART: True})
        balance = routing.balance_loss(_token_mask(given))
        if is_trained and coefficient:
            _check_balance_gradient(balance, (m for m in self.modules() if isinstance(m, RoutedAttention)))
        logits = _router_logits(routing, self.config.num_experts) if wants_logits else ()
        items = kwargs.get("num_items_in_batch")
        if is_trained and coefficient and balance.requires_grad:
            balance, logits = _attach(outputs, balance, logits, coefficient, items)
        if has_loss and coefficient:
            counted = labels[..., 1:] if labels is not None and self.can_generate() else labels
            weight = coefficient * _share_of_batch(counted, items)
            outputs.loss = outputs.loss + weight * balance.to(outputs.loss.device)
        if not (wants_logits or has_loss):
            return outputs
        found = {"router_logits": logits} if wants_logits else {}
        return output_class(type(outputs))(**outputs, aux_loss=balance, **found)

    unpacked: Callable[..., Any] = can_return_tuple(forward)
    return unpacked


def _router_logits(routing: RoutingRecord, width: int) -> tuple[Tensor, ...]:
    """The logits of the layers that route, `[B * N, width]`; -inf in columns that a layer has no head for."""

    def logits(info: RoutingInfo) -> Tensor:
        assert info.probs is not None
        log = info.probs.clamp_min(torch.finfo(info.probs.dtype).tiny).log().flatten(0, -2)
        return torch.nn.functional.pad(log, (0, width - log.shape[-1]), value=-torch.inf)

    return tuple(logits(info) for _, info in routing if info.probs is not None)


def _attach(
    outputs: ModelOutput, balance: Tensor, logits: tuple[Tensor, ...], weight: float, items: Tensor | int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Put the balance loss into the graph of a call's outputs; returns it and the router's logits as part of that graph."""
    names = [n for n, x in outputs.items() if n != "loss" and isinstance(x, Tensor) and x.requires_grad]
    balance, attached, logits = attach(balance, weight, [outputs[name] for name in names], logits, items)
    for name, tensor in zip(names, attached, strict=True):
        outputs[name] = tensor
    return balance, logits


def _token_mask(given: dict[str, Any]) -> Tensor | None:
    """The padding mask `[B, N]` if there is one of the inputs' own length; of B * choices rows for a multiple choice."""
    mask, inputs = given.get("attention_mask"), given.get("input_ids")
    if inputs is None:
        inputs = given.get("inputs_embeds")
    if not isinstance(mask, Tensor) or inputs is None or mask.dim() < 2 or mask.shape != inputs.shape[: mask.dim()]:
        return None
    return mask.flatten(0, -2)


def _share_of_batch(labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This call's share of an optimiser step's labels; -100 is not a label.

    With gradient accumulation the Trainer passes the step's number of labels and adds up the losses of its calls. The
    balance loss has to be averaged over the calls like the loss itself.
    """
    if labels is None or num_items_in_batch is None:
        return 1.0
    return (labels != -100).sum() / num_items_in_batch


def _check_balance_gradient(balance: Tensor, attentions: Iterable[RoutedAttention]) -> None:
    """Refuse a balance loss without a gradient where a router is to be trained by it.

    Raises:
        RuntimeError: reentrant gradient checkpointing has cut off the gradient.
    """
    if not balance.requires_grad and any(map(_is_trained, attentions)):
        raise RuntimeError(
            "the load-balance loss has no gradient: reentrant gradient checkpointing runs the layers without one; "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}, or router_aux_loss_coef=0"
        )


def _is_trained(attention: RoutedAttention) -> bool:
    """Whether anything that decides the routing of a layer with routed heads is to be trained."""
    router = attention.router
    source = attention.query_projection if router.reads_queries else router
    return any(p.requires_grad for p in source.parameters()) and bool(router.config.active_heads)


@torch.compiler.assume_constant_result  # torch.compile can't trace the making of a class
def output_class(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The model output `kind` with the fields `aux_loss` and `router_logits`; the same class for each call."""
    key: Any = kind  # mypy takes dataclasses for unhashable
    return _output_class(key)


@functools.cache
def _output_class(kind: type[ModelOutput]) -> type[ModelOutput]:
    fields = {"aux_loss": Tensor | None, "router_logits": tuple[Tensor, ...] | None}
    namespace = {"__annotations__": fields, "__module__": PACKAGE, **dict.fromkeys(fields)}
    return dataclass(type(f"MoH{kind.__name__}", (kind,), namespace))
