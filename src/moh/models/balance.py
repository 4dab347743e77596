"""What models of transformers need to add the load-balance loss to their own: its weight in a step, and a check.

The loss itself is `moh.RoutingInfo.balance_loss`. Not for timm's models, whose loss is the training loop's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_balance_gradient(balance: Tensor, attentions: Iterable[Any]) -> None:
    """Refuse a balance loss without a gradient where a router is to be trained by it.

    Args:
        balance: the balance loss of a forward pass in training.
        attentions: the MoH attention modules, each with `router` and `q_proj`.

    Raises:
        RuntimeError: reentrant gradient checkpointing has cut the gradient off.
    """
    if torch.is_grad_enabled() and not balance.requires_grad and any(map(_is_trained, attentions)):
        raise RuntimeError(
            "the load-balance loss has no gradient: reentrant gradient checkpointing runs the layers without one; "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}, or router_aux_loss_coef=0"
        )


def _is_trained(attention: Any) -> bool:
    """Whether anything that decides the routing of a layer with routed heads is to be trained."""
    source = attention.q_proj if attention.router.reads_queries else attention.router
    return bool(attention.router.config.active_heads) and any(p.requires_grad for p in source.parameters())


def share_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This call's share of an optimiser step's labels; -100 is no label.

    With gradient accumulation the Trainer gives the step's number of labels and adds the losses of its calls up. The
    balance loss has to be averaged over the calls like the loss itself.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels != -100).sum() / num_items_in_batch
