"""Backend `grouped`: PyTorch's own attention where every token uses as many heads in each key/value group.

The active queries are then gathered to `[B, groups * heads, N, D]`, an ordinary call of grouped-query attention of static
shape. Where whole groups are chosen, a single token reads the chosen groups' keys and values alone, but copies them first:
more work than reading all, unless few groups of many are chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def without_limits(q: Tensor, heads_per_group: int | None, groups_per_token: int | None) -> str | None:
    """Why these limits of what a token uses don't make the shapes of a call static, or None if they do."""
    if heads_per_group is not None or (groups_per_token is not None and q.shape[2] == 1):
        return None
    if groups_per_token is not None:
        return "tokens that choose groups of their own share keys and values only in a call with a single query"
    return "it needs heads_per_group or groups_per_token, which routing_unit='group_balanced' and 'kv_group' give"


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    heads_per_group: int | None = None,
    groups_per_token: int | None = None,
) -> Tensor:
    """Routed attention with the limits that `without_limits` wants; the rest as in `moh.attention.moh_attention`.

    A token that uses fewer heads than it may has the others computed and weighted 0.
    """
    B, H, N, _ = q.shape
    Hkv = k.shape[1]
    active = (gates != 0).view(B, N, Hkv, H // Hkv)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]  # [1 or B, 1 or H, 1 or N, 1 or Nk]
    if is_causal and N == 1:  # the first query sees the first key
        k, v, is_causal = k[:, :, :1], v[:, :, :1], False
        attn_mask = None if attn_mask is None else attn_mask[..., :1]
    heads = _heads_in_groups(active, heads_per_group)  # [B, N, Hkv, m], m of each group
    if groups_per_token is not None and groups_per_token < Hkv and N == 1:
        chosen = _first(active.any(-1)[:, 0], groups_per_token)  # [B, groups]
        heads = _take(heads, 2, chosen[:, None])
        row = torch.arange(B, device=k.device)[:, None]
        k, v = k[row, chosen], v[row, chosen]  # [B, groups, Nk, D]
    groups, m = heads.shape[2:]
    heads = heads.flatten(2)  # [B, N, R], R = groups * m

    rows_active = (gates != 0).gather(2, heads)[..., None]  # [B, N, R, 1]
    rows = torch.where(rows_active, _take(q.transpose(1, 2), 2, heads), 0.0).transpose(1, 2)  # [B, R, N, D]
    mask_per_head = attn_mask is not None and attn_mask.shape[1] > 1
    if attn_mask is not None and mask_per_head:
        attn_mask = attn_mask.expand(B, -1, N, -1).transpose(1, 2)  # [B, N, H, 1 or Nk]
        attn_mask = _take(attn_mask, 2, heads).transpose(1, 2)  # [B, R, N, 1 or Nk]
    if N == 1:  # the heads of a group are queries of one head, so that its keys and values are read once
        rows = rows.view(B, groups, m, q.shape[-1])
        if attn_mask is not None and mask_per_head:
            attn_mask = attn_mask.view(B, groups, m, attn_mask.shape[-1])
    elif is_causal and (attn_mask is not None or scale == 0):  # PyTorch's kernel scales by 0 what it has masked by -inf
        attn_mask, is_causal = _and_causal(attn_mask, k, N), False
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=N > 1 and m > 1
    )
    out = out.reshape(B, groups * m, N, v.shape[-1]).transpose(1, 2)  # [B, N, R, Dv]
    out = torch.where(rows_active, out, 0.0) * gates.gather(2, heads)[..., None]
    return out.new_zeros(B, N, H, v.shape[-1]).scatter(2, heads[..., None].expand_as(out), out)


def _heads_in_groups(active: Tensor, most: int | None) -> Tensor:
    """Indices of heads `[B, N, Hkv, m]`: in each group the active ones, filled up to m = `most` (None: all)."""
    B, N, Hkv, size = active.shape
    start = torch.arange(0, Hkv * size, size, device=active.device)[:, None]  # [Hkv, 1]
    if most is None or most == size:
        return (start + torch.arange(size, device=active.device)).expand(B, N, Hkv, size)
    return start + _first(active, most)


def _first(active: Tensor, count: int) -> Tensor:
    """Indices of the active entries of each row, filled up with others to `count`."""
    return active.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :count]


def _take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.gather(dim, index)` where `index` has the dimensions of x up to `dim` and the others are taken whole."""
    rest = x.shape[dim + 1 :]
    return x.gather(dim, index[(..., *[None] * len(rest))].expand(*index.shape, *rest))


def _and_causal(mask: Tensor | None, k: Tensor, N: int) -> Tensor:
    """`mask` with the keys after each of N queries' own places taken away."""
    seen = torch.ones(N, k.shape[2], dtype=torch.bool, device=k.device).tril()
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)
