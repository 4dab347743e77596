"""The definition of routed attention, dense and slow: every backend is compared with this one.

Computes every head, then weights it by its gate (the paper's weighted sum of heads, before W_O).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moh.attention.call import Call, hide, seen_by


def attend(call: Call) -> Tensor:
    """Routed attention by its definition.

    Low-precision inputs are computed in float32. A query that may see no key gives 0.
    """
    q, k, v, gates, attn_mask = call.q, call.k, call.v, call.gates, call.attn_mask
    dtype = q.dtype
    work = torch.promote_types(dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    active = (gates != 0)[..., None]  # [B, Nq, H, 1]
    # An inactive head counts as 0 before and after: even if it holds NaN, that reaches neither output nor gradients.
    q, k, v = torch.where(active.transpose(1, 2), q, 0.0).to(work), k.to(work), v.to(work)
    k = k.repeat_interleave(groups, dim=1)  # [B, H, Nk, D]
    v = v.repeat_interleave(groups, dim=1)

    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
    scores = q @ k.transpose(-2, -1) * scale  # [B, H, Nq, Nk]
    allowed = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    if call.is_causal:  # query i sees keys 0..i, as in scaled_dot_product_attention
        allowed = hide(allowed, seen_by(torch.arange(q.shape[2], device=q.device)[:, None], k.shape[2]))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    scores = torch.where(active.transpose(1, 2), scores, 0.0)  # the mask may hold NaN there

    blind = (scores == -math.inf).all(-1, keepdim=True)  # [B, H, Nq, 1]: their softmax would be NaN
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = torch.nn.functional.dropout(weights, call.dropout_p)
    heads = (weights @ v).transpose(1, 2)  # [B, Nq, H, D]

    return (torch.where(active, heads, 0.0) * gates[..., None]).to(dtype)
