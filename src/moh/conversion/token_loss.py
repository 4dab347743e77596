"""The loss of next tokens whose gradient is all that a conversion's backward pass keeps of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moh.data.text.blocks import IGNORED

_LOSS_TOKENS = 32
"""Tokens whose probabilities over the vocabulary are held at once: 6 MB with SmolLM2's."""


class _SummedLoss(torch.autograd.Function):
    """See `summed_loss`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        parts = zip(logits.split(_LOSS_TOKENS), targets.split(_LOSS_TOKENS), strict=True)
        losses = [nn.functional.cross_entropy(z.float(), t, reduction="sum", ignore_index=IGNORED) for z, t in parts]
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        for into, z, t in zip(*(x.split(_LOSS_TOKENS) for x in (found, logits, targets)), strict=True):
            counted = (t != IGNORED)[:, None]
            p = z.float().softmax(-1).mul_(counted)
            p.scatter_add_(1, t.clamp_min(0)[:, None], -counted.to(p.dtype))
            into.copy_(p.mul_(gradients[0]))
        return found, None


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies `[T, V]`, `[T]` -> scalar, whose gradient takes the logits' memory once, not three times.

    Args:
        logits: of any dtype; the loss is computed in float32.
        targets: ids, or `IGNORED`.
    """
    loss: Tensor = _SummedLoss.apply(logits, targets)
    return loss
