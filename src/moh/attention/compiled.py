"""The packed backend as one operator, `moh::packed_attention`, so that `torch.compile` keeps one graph around it.

How many rows are active is known only at run time, which a compiled graph can't hold; an opaque operator can. Its
backward pass runs the forward pass again. Not used outside of `torch.compile`: plain autograd needs no second run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moh.attention.packed import packed_attention

# The body reads counts from the device, which a CUDA graph can't record.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("moh::packed_attention", mutates_args=(), tags=_TAGS)
def packed_attention_op(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return packed_attention(q, k, v, gates, is_causal=is_causal, attn_mask=attn_mask, scale=scale).contiguous()


@packed_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


@torch.library.custom_op("moh::packed_attention_backward", mutates_args=(), tags=_TAGS)
def packed_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return packed_attention(q, k, v, gates, is_causal=is_causal, attn_mask=attn_mask, scale=scale)

    # An operator's body runs below autograd, where requires_grad_() records nothing; vjp works there too.
    vjp = torch.func.vjp(forward, q, k, v, gates)[1]
    dq, dk, dv, dgates = (g.contiguous() for g in vjp(grad))
    return dq, dk, dv, dgates


@packed_attention_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gates.new_empty(gates.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, gates, attn_mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gates, attn_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, gates, attn_mask = ctx.saved_tensors
    grads = packed_attention_backward_op(grad, q, k, v, gates, attn_mask, ctx.is_causal, ctx.scale)
    return (*grads, None, None, None)


packed_attention_op.register_autograd(_backward, setup_context=_setup_context)


def packed_attention_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The operator behind the signature that every backend has; needs dropout_p = 0 and a mask without gradient."""
    out: Tensor = packed_attention_op(q, k, v, gates, attn_mask, is_causal, scale)
    return out
