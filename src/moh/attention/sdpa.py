"""Backend `sdpa`: gather the active (token, head) pairs, run PyTorch's own attention on them alone, scatter back.

Pure PyTorch, any device. The rows of one key/value head are all its active (token, query head) pairs in token order,
so grouped-query attention expands no keys or values, and decoding packs the active heads of a single token.

How many rows are active is known only at run time, which a compiled graph can't hold; an opaque operator can. So
`torch.compile` gets the operator `moh::packed_attention` and keeps one graph around it. Its backward pass runs the
forward pass again, which plain autograd need not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moh.attention import reference
from moh.attention.call import Call, hide, seen_by, vmap_is_active
from moh.attention.rows import packed_rows_of, rows_of, token_major

CAUSAL_CHUNKS = 8
"""A causal call is cut into this many runs of rows, each against the keys it may see: with 8, work above the diagonal
is 1/16 of the square; more runs cost more calls than they save."""

MIN_CHUNK_ROWS = 128
"""Shorter runs are not worth a call of their own."""

MIN_BUCKET_QUERIES = 64
"""With fewer queries, as in decoding, reading keys and values dominates, and copying them by bucket would double it."""

BUCKET_FILL = 0.85
"""Heads that share a call have at least this part of the fullest one's rows: the rest is padding."""

LARGEST_BIAS = 2.0**16
"""In float32, a log-sum-exp next to scores of this size is known to within 1/256."""


# The body reads counts from the device, which a CUDA graph can't record.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def why_not(call: Call) -> str | None:
    """Why the backend can't handle the call, or None."""
    return "it has no rule for torch.func.vmap, under which rows can't be counted" if vmap_is_active() else None


def attend(call: Call) -> Tensor:
    """Routed attention on the active pairs only."""
    mask = call.attn_mask
    if call.q.is_meta:  # no numbers to count rows by: shapes and dtypes are those of the definition
        return reference.attend(call)
    traced = (
        torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    )  # a trace would keep the number of rows
    if traced and not call.dropout_p and not (mask is not None and mask.requires_grad):
        out: Tensor = packed_attention_op(call.q, call.k, call.v, call.gates, mask, call.is_causal, call.scale)
        return out
    eager: Tensor = _attend_eager(call)
    return eager


@torch.compiler.disable  # the number of active rows decides the shapes
def _attend_eager(call: Call) -> Tensor:
    return packed_attention(call)


def packed_attention(call: Call) -> Tensor:
    """`attend` outside of compiled graphs: one call of PyTorch's attention, or one per bucket of key/value heads."""
    q, k, v, gates, attn_mask = call.q, call.k, call.v, call.gates, call.attn_mask
    B, H, Nq, _ = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    if H == 0:  # nothing to compute, but all inputs get gradients
        return gates[..., None].expand(B, Nq, 0, v.shape[-1]) * sum(x.flatten()[:0].sum() for x in (q, k, v))
    if Nq < MIN_BUCKET_QUERIES or Hkv == 1 or B == 0:
        return _attend_bucket(call)
    counts = (gates != 0).view(B, Nq, Hkv, G).sum((1, 3)).amax(0)  # [Hkv]: rows that each has to work through
    buckets = _buckets(counts.tolist(), full=Nq * G)
    if len(buckets) == 1:
        return _attend_bucket(call)
    parts = []
    for bucket in buckets:
        heads = [head * G + i for head in bucket for i in range(G)]
        mask = attn_mask[:, heads] if attn_mask is not None and attn_mask.shape[1] > 1 else attn_mask
        part = call._replace(q=q[:, heads], k=k[:, bucket], v=v[:, bucket], gates=gates[..., heads], attn_mask=mask)
        parts.append(_attend_bucket(part))
    order = [head * G + i for bucket in buckets for head in bucket for i in range(G)]
    position = sorted(range(H), key=order.__getitem__)  # the inverse permutation
    return torch.cat(parts, dim=2)[:, :, position]


def _buckets(counts: list[int], full: int) -> list[list[int]]:
    """Key/value heads with about as many rows each, fullest first; those with all rows by themselves, ungathered."""
    buckets: list[list[int]] = []
    for head in sorted(range(len(counts)), key=lambda h: -counts[h]):
        first = counts[buckets[-1][0]] if buckets else 0
        if buckets and counts[head] >= BUCKET_FILL * first and (first < full or counts[head] == full):
            buckets[-1].append(head)
        else:
            buckets.append([head])
    return buckets


def _attend_bucket(call: Call) -> Tensor:
    """`packed_attention` of heads that are padded to the same number of rows."""
    q, k, v, gates, attn_mask = call.q, call.k, call.v, call.gates, call.attn_mask
    B, H, Nq, _ = q.shape
    Hkv, Nk = k.shape[1:3]
    active = gates != 0  # [B, Nq, H]
    if bool(active.all()):  # nothing to leave out, so nothing to gather
        is_causal = call.is_causal
        if is_causal and attn_mask is not None:
            attn_mask, is_causal = hide(attn_mask, seen_by(torch.arange(Nq, device=q.device)[:, None], Nk)), False
        heads = pytorch_attention(q, k, v, attn_mask, call.dropout_p, is_causal, scale=call.scale, enable_gqa=Hkv < H)
        return heads.transpose(1, 2) * gates[..., None]

    active = rows_of(active.transpose(1, 2), Hkv)  # [B, Hkv, Nq*G]
    most = max(int(active.sum(-1).max()), 1)  # M: rows that the fullest key/value head has to work through
    # The order of `rows.pack`. Sorting takes half as long for the few rows of decoding, and hardly counts for many.
    rows = torch.argsort(~active, dim=-1, stable=True)[..., :most]  # [B, Hkv, M]
    live = active.gather(2, rows)  # less full heads compute some inactive rows too, whose output is dropped
    packed = _attend_rows(call._replace(q=packed_rows_of(q, rows, live)), rows, live, H // Hkv)  # [B, Hkv, M, Dv]

    packed_gates = rows_of(gates.transpose(1, 2), Hkv).gather(2, rows)[..., None]  # [B, Hkv, M, 1]
    packed = torch.where(live[..., None], packed, 0.0) * packed_gates
    out = packed.new_zeros(B, Hkv, Nq * (H // Hkv), v.shape[-1])
    return token_major(out.scatter(2, rows[..., None].expand_as(packed), packed), Nq)


def _attend_rows(call: Call, rows: Tensor, live: Tensor, G: int) -> Tensor:
    """Attention of the packed rows `[B, Hkv, M, D]` in the call's q; when causal, in runs, each with the keys it may see."""
    q, k, v, attn_mask, dropout_p, scale = call.q, call.k, call.v, call.attn_mask, call.dropout_p, call.scale
    Hkv, Nk = k.shape[1:3]
    if not call.is_causal:
        mask = None if attn_mask is None else _packed_mask(attn_mask, rows, G, Hkv)
        return pytorch_attention(q, k, v, mask, dropout_p, live=live, scale=scale)
    outputs: list[Tensor] = []
    size = max(MIN_CHUNK_ROWS, -(-q.shape[2] // CAUSAL_CHUNKS))
    for run in rows.split(size, dim=2):  # [B, Hkv, m]
        start = len(outputs) * size
        tokens = run // G  # the query position of each row
        keys = min(int(tokens.max()) + 1, Nk)
        mask = None if attn_mask is None else _packed_mask(attn_mask[..., :keys], run, G, Hkv)
        mask = hide(mask, seen_by(tokens[..., None], keys))  # [B, Hkv, m, keys]
        run_q, run_live = q[:, :, start : start + size], live[..., start : start + size]
        run_k, run_v = k[:, :, :keys], v[:, :, :keys]
        outputs.append(pytorch_attention(run_q, run_k, run_v, mask, dropout_p, live=run_live, scale=scale))
    return torch.cat(outputs, dim=2)


def pytorch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool = False,
    *,
    live: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`scaled_dot_product_attention`, by its plain formula where its fast kernels break the rule for masks (`call.py`).

    In 16 bits they overlook +inf on the CPU, and next to the lowest numbers a log-sum-exp loses the sum that the backward
    pass needs. A maximum over the keys shows it. Not on GPUs, where reading it would wait for the device, nor in a graph.

    Args:
        q: as there.
        k: as there.
        v: as there.
        attn_mask: as there.
        dropout_p: as there.
        is_causal: as there.
        live: which rows of q count, `[B, heads, rows]`: the mask of others is then not read. None means all.
        **options: `scale` and `enable_gqa`.
    """
    is_eager = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_eager and attn_mask is not None and attn_mask.is_floating_point() and attn_mask.shape[-1] > 0:
        most = attn_mask.detach().amax(-1).double()  # [1 or B, 1 or H, 1 or Nq]
        if bool((~(most.abs() <= LARGEST_BIAS) & (most != -torch.inf)).any()):  # or NaN
            attn_mask = attn_mask if live is None else torch.where(live[..., None], attn_mask, 0.0)
            # Called directly: torch.nn.attention.sdpa_kernel switches for all threads of the process
            plain = torch.ops.aten._scaled_dot_product_attention_math
            result: Tensor = plain(q, k, v, attn_mask, dropout_p, is_causal, None, **options)[0]
            return result
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)


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
        by_row, index = rows_of(mask.expand(B, -1, -1, -1), Hkv), rows
    return by_row.gather(2, index[..., None].expand(B, Hkv, M, keys))


@torch.library.custom_op("moh::packed_attention", mutates_args=(), tags=_TAGS)
def packed_attention_op(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return packed_attention(Call(q, k, v, gates, attn_mask, is_causal, scale)).contiguous()


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
        return packed_attention(Call(q, k, v, gates, attn_mask, is_causal, scale))

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
