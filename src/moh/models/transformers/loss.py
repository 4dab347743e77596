"""The load-balance loss inside the loss of a family's own model, for any of its heads.

The loss itself is `moh.RoutingInfo.balance_loss`; what a training step needs of it is in `moh.models.balance`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from moh.models.balance import check_balance_gradient, share_of_batch
from moh.models.transformers.attention import RoutedAttention
from moh.routing import record_routing


def with_balance_loss(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward` with the load-balance loss in `outputs.loss`, its signature as before.

    Where labels are given and `config.router_aux_loss_coef` is above 0, the balance loss is added with that weight, and
    is in `outputs.aux_loss` without it.
    """
    signature = inspect.signature(dense_forward)

    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        labels, coefficient = given.get("labels"), self.config.router_aux_loss_coef
        if labels is None or coefficient == 0:
            return dense_forward(self, *args, **kwargs | {"return_dict": True})
        with record_routing(self.base_model) as routing:
            outputs = dense_forward(self, *args, **kwargs | {"return_dict": True})
        balance = routing.balance_loss(_token_mask(given))
        if self.training:
            attentions = [m for m in self.modules() if isinstance(m, RoutedAttention)]
            check_balance_gradient(
                balance, (SimpleNamespace(router=a.router, q_proj=a.query_projection) for a in attentions)
            )
        counted = labels[..., 1:] if self.can_generate() else labels
        weight = coefficient * share_of_batch(counted, kwargs.get("num_items_in_batch"))
        outputs.loss = outputs.loss + weight * balance.to(outputs.loss.device)
        return _with_aux_loss(type(outputs))(**outputs, aux_loss=balance)  # type: ignore[arg-type]

    unpacked: Callable[..., Any] = can_return_tuple(forward)
    return unpacked


def _token_mask(given: dict[str, Any]) -> Tensor | None:
    """The padding mask `[B, N]` if there is one of the inputs' own length."""
    mask, inputs = given.get("attention_mask"), given.get("input_ids")
    if inputs is None:
        inputs = given.get("inputs_embeds")
    if mask is None or inputs is None or mask.dim() != 2 or mask.shape != inputs.shape[:2]:
        return None
    return mask  # type: ignore[no-any-return]


@functools.cache
def _with_aux_loss(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The model output `kind` with a field `aux_loss`."""
    fields = {"__annotations__": {"aux_loss": Tensor | None}, "aux_loss": None, "__module__": __name__}
    return dataclass(type(f"MoH{kind.__name__}", (kind,), fields))
