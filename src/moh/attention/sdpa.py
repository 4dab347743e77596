"""Backend `sdpa`: gather the active (token, head) pairs, run PyTorch's own attention on them alone, scatter back.

Pure PyTorch, any device. The rows of one key/value head are all its active (token, query head) pairs in token order,
so grouped-query attention expands no keys or values, and decoding packs the active heads of a single token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CAUSAL_CHUNKS = 8
"""A causal call is cut into this many runs of rows, each against the keys it may see: 8 leaves 1/16 of the square
above the diagonal in the work; more runs cost more calls than they save."""

MIN_CHUNK_ROWS = 128
"""Shorter runs are not worth a call of their own."""

MIN_BUCKET_QUERIES = 64
"""With fewer queries, as in decoding, reading keys and values is the work, and copying them by bucket would double it."""

BUCKET_FILL = 0.85
"""Heads that share a call have at least this part of the fullest one's rows: the rest is padding."""


def packed_attention(
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
    """Routed attention on the active pairs only; arguments and result as in `moh.attention.moh_attention`."""
    B, H, Nq, D = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]  # [1 or B, 1 or H, 1 or Nq, 1 or Nk]
    options = (is_causal, scale, dropout_p)
    if Nq < MIN_BUCKET_QUERIES or Hkv == 1 or B == 0:
        return _attend_group(q, k, v, gates, attn_mask, *options)
    counts = (gates != 0).view(B, Nq, Hkv, G).sum((1, 3)).amax(0)  # [Hkv]: rows that each has to work through
    buckets = _buckets(counts.tolist(), full=Nq * G)
    if len(buckets) == 1:
        return _attend_group(q, k, v, gates, attn_mask, *options)
    parts = []
    for bucket in buckets:
        heads = [head * G + i for head in bucket for i in range(G)]
        mask = attn_mask[:, heads] if attn_mask is not None and attn_mask.shape[1] > 1 else attn_mask
        parts.append(_attend_group(q[:, heads], k[:, bucket], v[:, bucket], gates[..., heads], mask, *options))
    order = [head * G + i for bucket in buckets for head in bucket for i in range(G)]
    position = sorted(range(H), key=order.__getitem__)
    return torch.cat(parts, dim=2)[:, :, position]


def _buckets(counts: list[int], full: int) -> list[list[int]]:
    """Key/value heads with about as many rows each, fullest first; those with all rows stay by themselves."""
    buckets: list[list[int]] = []
    for head in sorted(range(len(counts)), key=lambda h: -counts[h]):
        first = counts[buckets[-1][0]] if buckets else 0
        if buckets and counts[head] >= BUCKET_FILL * first and (first < full or counts[head] == full):
            buckets[-1].append(head)
        else:
            buckets.append([head])
    return buckets


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """`packed_attention` of heads that are padded to the same number of rows; the mask has 4 dimensions."""
    B, H, Nq, D = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    active = gates != 0  # [B, Nq, H]
    if bool(active.all()):  # nothing to leave out, so nothing to gather
        mask = attn_mask
        if is_causal and attn_mask is not None:
            mask, is_causal = _and_seen(attn_mask, torch.arange(Nq, device=q.device)[:, None], k.shape[2]), False
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=G > 1)
        return heads.transpose(1, 2) * gates[..., None]

    rows_active = _rows(active.transpose(1, 2), Hkv)  # [B, Hkv, Nq*G], token-major
    most = max(int(rows_active.sum(-1).max()), 1)  # M: rows that the fullest key/value head has to work through
    # Active rows first, in token order. A less full head works through some inactive rows too; their output is dropped,
    # and their query is 0, for a NaN in it would come back to the keys as a gradient.
    rows = torch.argsort(~rows_active, dim=-1, stable=True)[..., :most]  # [B, Hkv, M]
    packed_q = _rows(q, Hkv).gather(2, rows[..., None].expand(-1, -1, -1, D))  # [B, Hkv, M, D]
    packed_active = rows_active.gather(2, rows)[..., None]  # [B, Hkv, M, 1]
    packed_q = torch.where(packed_active, packed_q, 0.0)
    packed = _attend(packed_q, k, v, rows, G, is_causal, attn_mask, scale, dropout_p)  # [B, Hkv, M, Dv]

    packed_gates = _rows(gates.transpose(1, 2), Hkv).gather(2, rows)[..., None]  # [B, Hkv, M, 1]
    packed = torch.where(packed_active, packed, 0.0) * packed_gates
    out = packed.new_zeros(B, Hkv, Nq * G, v.shape[-1]).scatter(2, rows[..., None].expand_as(packed), packed)
    return out.view(B, Hkv, Nq, G, -1).transpose(1, 2).reshape(B, Nq, H, -1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    G: int,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Attention of the packed rows `[B, Hkv, M, D]`; when causal, in runs that see only the keys they may."""
    M, Nk = q.shape[2], k.shape[2]
    if not is_causal:
        mask = None if attn_mask is None else _packed_mask(attn_mask, rows, G, k.shape[1])
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    outputs: list[Tensor] = []
    size = max(MIN_CHUNK_ROWS, -(-M // CAUSAL_CHUNKS))
    for run in rows.split(size, dim=2):  # [B, Hkv, m]
        start = len(outputs) * size
        tokens = run // G  # the query position of each row
        keys = min(int(tokens.max()) + 1, Nk)
        mask = None if attn_mask is None else _packed_mask(attn_mask[..., :keys], run, G, k.shape[1])
        mask = _and_seen(mask, tokens[..., None], keys)  # [B, Hkv, m, keys]
        run_q = q[:, :, start : start + size]
        outputs.append(
            F.scaled_dot_product_attention(run_q, k[:, :, :keys], v[:, :, :keys], mask, dropout_p, scale=scale)
        )
    return torch.cat(outputs, dim=2)


def _rows(x: Tensor, Hkv: int) -> Tensor:
    """`[B, H, Nq, ...]` -> `[B, Hkv, Nq*G, ...]`: the (token, query head) rows of each key/value head, token-major."""
    B, H, Nq = x.shape[:3]
    return x.reshape(B, Hkv, H // Hkv, *x.shape[2:]).transpose(2, 3).reshape(B, Hkv, Nq * (H // Hkv), *x.shape[3:])


def _and_seen(mask: Tensor | None, tokens: Tensor, keys: int) -> Tensor:
    """`mask` with the keys after each row's own token taken away; `tokens` is `[..., rows, 1]`."""
    seen = torch.arange(keys, device=tokens.device) <= tokens
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)


def _packed_mask(mask: Tensor, rows: Tensor, G: int, Hkv: int) -> Tensor:
    """The mask, broadcastable to `[B, H, Nq, Nk]`, for the packed `rows` `[B, Hkv, M]`: `[B, Hkv, M, Nk]` or less."""
    B, M = rows.shape[0], rows.shape[2]
    heads, queries, keys = mask.shape[1:]
    if heads == 1 and queries == 1:
        return mask  # the same for every row (key padding)
    if queries == 1:
        by_row, index = mask.expand(B, -1, -1, -1), rows % G
        by_row = by_row.reshape(B, Hkv, G, keys)
    elif heads == 1:
        by_row, index = mask.expand(B, Hkv, -1, -1), rows // G
    else:
        by_row, index = _rows(mask.expand(B, -1, -1, -1), Hkv), rows
    return by_row.gather(2, index[..., None].expand(B, Hkv, M, keys))
