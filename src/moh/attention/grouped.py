"""Backend `grouped`: PyTorch's own attention where tokens use equally many heads of every key/value group.

The active queries are then gathered to `[B, groups * heads, N, D]`, an ordinary call of grouped-query attention of static
shape. Without such a limit it computes all heads, as exports of timm's ViT do; that saves nothing, so it is used only by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moh.attention.call import Call, hide, seen_by
from moh.attention.sdpa import pytorch_attention
from moh.routing.units import is_for_all_settings


def why_not(call: Call) -> str | None:
    """Why the backend can't handle the call, or None."""
    return "it needs at least one query head" if call.q.shape[1] == 0 else None


def why_not_chosen(call: Call) -> str | None:
    """Why it is used only by name, or None."""
    if call.heads_per_group is None:
        return "it computes all heads without heads_per_group, which routing_unit='group_balanced' gives"
    return None


def attend(call: Call) -> Tensor:
    """Routed attention of `heads_per_group` heads in every group, or of all.

    Where a token uses fewer, others are computed too and weighted 0.
    """
    q, k, v, gates, attn_mask, is_causal = call.q, call.k, call.v, call.gates, call.attn_mask, call.is_causal
    B, H, N, _ = q.shape
    Hkv = k.shape[1]
    m = H // Hkv if call.heads_per_group is None else call.heads_per_group
    if is_causal and N == 1:  # the only query sees the first key alone
        k, v, is_causal = k[:, :, :1], v[:, :, :1], False
        attn_mask = None if attn_mask is None else attn_mask[..., :1]
    active = gates != 0  # [B, N, H]
    gathers = is_for_all_settings() or m < H // Hkv
    heads = _heads_in_groups(active.view(B, N, Hkv, H // Hkv), m) if gathers else None  # [B, N, R], R = Hkv * m

    rows_active = _take(active[..., None], heads)  # [B, N, R, 1]
    live = rows_active.squeeze(-1).transpose(1, 2)  # [B, R, N]
    rows = torch.where(rows_active, _take(q.transpose(1, 2), heads), 0.0).transpose(1, 2)  # [B, R, N, D]
    mask_per_head = attn_mask is not None and attn_mask.shape[1] > 1
    if attn_mask is not None and mask_per_head:
        attn_mask = attn_mask.expand(B, -1, N, -1).transpose(1, 2)  # [B, N, H, 1 or Nk]
        attn_mask = _take(attn_mask, heads).transpose(1, 2)  # [B, R, N, 1 or Nk]
    if N == 1:  # a group's heads as queries of one head: its keys and values are read once
        rows, live = rows.view(B, Hkv, m, q.shape[-1]), live.view(B, Hkv, m)
        if attn_mask is not None and mask_per_head:
            attn_mask = attn_mask.view(B, Hkv, m, attn_mask.shape[-1])
    elif is_causal and (attn_mask is not None or call.scale == 0):
        # PyTorch's kernel masks by -inf before it scales: by 0 that gives NaN
        attn_mask, is_causal = hide(attn_mask, seen_by(torch.arange(N, device=k.device)[:, None], k.shape[2])), False
    shares_keys = bool(N > 1 and (is_for_all_settings() or m > 1))
    out = pytorch_attention(
        rows, k, v, attn_mask, call.dropout_p, is_causal, live=live, scale=call.scale, enable_gqa=shares_keys
    )
    out = out.reshape(B, Hkv * m, N, v.shape[-1]).transpose(1, 2)  # [B, N, R, Dv]
    out = torch.where(rows_active, out, 0.0) * _take(gates[..., None], heads)
    if heads is None:
        return out
    return out.new_zeros(B, N, H, v.shape[-1]).scatter(2, heads[..., None].expand_as(out), out)


def _heads_in_groups(active: Tensor, m: int) -> Tensor:
    """Indices of heads `[B, N, Hkv * m]`: in each group of `[B, N, Hkv, G]` the active ones, filled up to m with others."""
    Hkv, G = active.shape[2:]
    start = torch.arange(0, Hkv * G, G, device=active.device)[:, None]  # [Hkv, 1]
    # As falling ranks, active heads first, in order of their index: exporters have no rule for a stable sort
    rank = active.to(torch.int32) * G - torch.arange(G, dtype=torch.int32, device=active.device)
    return (start + rank.topk(m, dim=-1).indices).flatten(2)


def _take(x: Tensor, heads: Tensor | None) -> Tensor:
    """Each token's `heads` `[B, N, R]` of x `[B, N, H, D]`: `[B, N, R, D]`; None takes all."""
    return x if heads is None else x.gather(2, heads[..., None].expand(-1, -1, -1, x.shape[-1]))
