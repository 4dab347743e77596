"""The definition of routed attention, dense and slow: every backend is compared with this one.

Computes every head, then weights it by its gate (the paper's weighted sum of heads, before W_O). Not for use in models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_scores_mask(
    q: Tensor, k: Tensor, *, is_causal: bool, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(allowed, bias): a bool mask and an additive one, each broadcastable to `[B, H, Nq, Nk]`, or None."""
    allowed = bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        bias = attn_mask
    if is_causal:  # query i sees keys 0..i, as in scaled_dot_product_attention
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        allowed = causal if allowed is None else allowed & causal
    return allowed, bias


def reference_attention(
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
    """Routed attention by its definition; arguments and result as in `moh.attention.moh_attention`.

    Low-precision inputs are computed in float32. A query that may see no key gives 0.
    """
    dtype = q.dtype
    work = torch.promote_types(dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    active = (gates != 0)[..., None]  # [B, Nq, H, 1]
    # An inactive head counts as 0 before and after: even if it holds NaN, that reaches neither output nor gradients.
    q, k, v = torch.where(active.transpose(1, 2), q, 0.0).to(work), k.to(work), v.to(work)
    k = k.repeat_interleave(groups, dim=1)  # [B, H, Nk, D]
    v = v.repeat_interleave(groups, dim=1)

    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale  # [B, H, Nq, Nk]
    allowed, bias = attention_scores_mask(q, k, is_causal=is_causal, attn_mask=attn_mask)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)

    blind = (scores == -math.inf).all(-1, keepdim=True)  # [B, H, Nq, 1]
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    heads = (weights @ v).transpose(1, 2)  # [B, Nq, H, D]

    return (torch.where(active, heads, 0.0) * gates[..., None]).to(dtype)
