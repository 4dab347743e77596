"""Backend `flex`: PyTorch's FlexAttention with active rows at the front; blocks without work are skipped.

The blocks to visit, and those that need no mask, are found on the device from counts and positions, with static shapes:
nothing waits for a number. On the CPU FlexAttention has only a forward pass; the backend is for checks there, never chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moh.attention.call import Call, unsupported_dtype, unsupported_options, with_four_dims
from moh.attention.rows import Packing, pack, packed_rows_of, token_major

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MIN_WIDTH = 16
"""FlexAttention's kernels multiply tiles at least this wide."""
MAX_WIDTH = 256

BLOCK = 128
"""Rows and keys of a block: FlexAttention's own choice, which its kernels' tiles divide."""


def why_not(call: Call) -> str | None:
    """Why the backend can't handle the call, or None."""
    q, k, v = call.q, call.k, call.v
    if q.device.type not in ("cuda", "cpu"):
        return f"it runs on GPUs, not on {q.device.type}"
    if q.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "FlexAttention's kernels need Triton, which is not installed; it comes with PyTorch's CUDA wheels"
    if (reason := unsupported_dtype(q)) is not None:
        return reason
    widths = (q.shape[-1], v.shape[-1])
    if q.device.type == "cuda" and not (min(widths) >= MIN_WIDTH and max(widths) <= MAX_WIDTH):
        return f"it supports heads of width {MIN_WIDTH} to {MAX_WIDTH}, not {q.shape[-1]} and {v.shape[-1]}"
    if min(q.shape) == 0 or min(v.shape) == 0:
        return "it needs at least one query and one key"
    if (reason := unsupported_options(call.attn_mask, call.dropout_p)) is not None:
        return reason
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "FlexAttention has no gradients on the CPU"
    return None


def attend(call: Call) -> Tensor:
    """Routed attention by FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import, and few calls need it

    q, k, v, gates = call.q, call.k, call.v, call.gates
    Nq, Hkv = q.shape[2], k.shape[1]
    G = q.shape[1] // Hkv
    packing = pack(gates.detach(), Hkv)
    mask = None if call.attn_mask is None else call.attn_mask.detach()
    blocks = block_mask_of(packing, G, k.shape[2], is_causal=call.is_causal, attn_mask=mask)
    score_mod = None
    if mask is not None and mask.dtype != torch.bool:
        score_mod = _bias_of(mask, packing.rows.to(torch.int32), packing.counts, G)

    live = torch.arange(Nq * G, device=q.device) < packing.counts[..., None]  # [B, Hkv, M]
    rows = packed_rows_of(q, packing.rows, live)  # [B, Hkv, M, D]
    factor = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
    attention: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    heads: Tensor = attention(rows, k, v, score_mod=score_mod, block_mask=blocks, scale=factor)
    heads = torch.where(live[..., None], heads, 0.0)  # [B, Hkv, M, Dv]
    heads = heads.gather(2, packing.places[..., None].expand(-1, -1, -1, v.shape[-1]))
    return token_major(heads, Nq) * gates[..., None]


def _bias_of(mask: Tensor, rows: Tensor, counts: Tensor, G: int) -> Callable[..., Tensor]:
    """The score_mod that adds the mask `[1 or B, 1 or H, 1 or Nq, 1 or Nk]` to packed rows.

    FlexAttention computes in units of log2, where the lowest numbers would become -inf and hide a key, and takes rows that
    are NaN throughout for hidden ones, which it does not with +inf. Rows from `counts` on are inactive: 0, as NaN would get
    into the keys' gradient.
    """
    batch, head, query, key = (int(size > 1) for size in mask.shape)
    lowest = torch.finfo(torch.float32).min * math.log(2)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, r: Tensor, n: Tensor) -> Tensor:
        row = rows[b, h, r]
        bias = mask[b * batch, (h * G + row % G) * head, (row // G) * query, n * key].to(score.dtype)
        bias = torch.where((bias < lowest) & (bias > -torch.inf), lowest, bias)
        bias = torch.where(bias.isnan(), torch.inf, bias)
        return score + torch.where(r < counts[b, h], bias, 0.0)

    return add_bias


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention, compiled: else it skips nothing. Within a compiled graph it is compiled anyway."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def block_mask_of(
    packing: Packing,
    G: int,
    Nk: int,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    block: int = BLOCK,
) -> BlockMask:
    """The BlockMask `[B, Hkv, M, Nk]` of packed rows, G query heads per key/value head.

    Args:
        packing: from `pack`.
        G: query heads per key/value head.
        Nk: keys.
        is_causal: token t sees keys 0 to t.
        attn_mask: with 4 dimensions; an additive one hides nothing here.
        block: rows and keys of a block.
    """
    from torch.nn.attention.flex_attention import BlockMask  # slow to import, and few calls need it

    hidden = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
    needed, whole = blocks_of(packing, G, Nk, is_causal=is_causal, allowed=hidden, block=block)
    part, part_at = _listed(needed & ~whole)
    full, full_at = _listed(whole)
    rows = packing.rows.to(torch.int32)
    mask_mod = _mask_mod(rows, G, is_causal, hidden)
    return BlockMask.from_kv_blocks(
        part, part_at, full, full_at, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(rows.shape[-1], Nk)
    )


def blocks_of(
    packing: Packing,
    G: int,
    Nk: int,
    *,
    is_causal: bool,
    allowed: Tensor | None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """(needed, whole), bool `[B, Hkv, row blocks, key blocks]`: where some row sees some key, where all rows see all keys.

    `needed` may have a block too many where a mask differs between the heads of a group; never one too few.
    """
    M = packing.rows.shape[-1]
    counts = packing.counts[..., None]  # [B, Hkv, 1]
    starts = torch.arange(0, M, block, device=counts.device)  # [row blocks]
    live = starts < counts
    last_row = torch.minimum(starts + block, counts).sub(1).clamp_min(0)
    first = (packing.rows[..., ::block] // G)[..., None]  # [B, Hkv, row blocks, 1]: tokens
    last = (packing.rows.gather(2, last_row) // G)[..., None]
    key = torch.arange(0, Nk, block, device=counts.device)  # the first of each block
    end = key + block - 1

    needed = live[..., None].expand(*live.shape, len(key))
    # Blocks that reach beyond the last row or key must be masked.
    whole = needed & (end < Nk) & (starts + block <= M)[:, None]
    if is_causal:  # rows are in token order, so the last sees most keys and the first fewest
        needed, whole = needed & (key <= last), whole & (end <= first)
    if allowed is not None:
        some, every = _allowed_blocks(allowed, packing, G, Nk, first, last, block)
        needed, whole = needed & some, whole & every
    return needed, whole & needed


def _allowed_blocks(
    allowed: Tensor, packing: Packing, G: int, Nk: int, first: Tensor, last: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """(some, every): whether, of tokens first to last, one sees one of a key block's keys; whether all see all of them."""
    B, Hkv = packing.counts.shape
    heads, queries = allowed.shape[1:3]
    blocks = -(-Nk // block)
    padding = (0, blocks * block - Nk)
    allowed = allowed.expand(B, heads, queries, Nk)
    # [B, heads, queries, key blocks]; padding beyond the last key neither allows nor forbids
    some = torch.nn.functional.pad(allowed, padding, value=False).unflatten(-1, (blocks, block)).any(-1)
    every = torch.nn.functional.pad(allowed, padding, value=True).unflatten(-1, (blocks, block)).all(-1)
    if heads > 1:
        some, every = some.unflatten(1, (Hkv, G)).any(2), every.unflatten(1, (Hkv, G)).all(2)
    if queries == 1:
        return some.expand(B, Hkv, 1, blocks), every.expand(B, Hkv, 1, blocks)
    shape = (B, Hkv, first.shape[2], blocks)

    def tokens_with(flag: Tensor) -> Tensor:
        """How many of the tokens first to last have the flag: a difference of two prefix sums."""
        upto = torch.nn.functional.pad(flag.cumsum(2), (0, 0, 1, 0)).expand(B, Hkv, -1, -1)
        return upto.gather(2, (last + 1).expand(shape)) - upto.gather(2, first.expand(shape))

    return tokens_with(some) > 0, tokens_with(every) == last - first + 1


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(number of key blocks of each row block, all indices with those first), int32."""
    at = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), at.to(torch.int32)


def _mask_mod(
    rows: Tensor, G: int, is_causal: bool, allowed: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask_mod: whether packed row r, of token `rows[b, h, r] // G`, sees key n."""
    batch, head, query, key = (int(size > 1) for size in allowed.shape) if allowed is not None else (0, 0, 0, 0)

    def sees(b: Tensor, h: Tensor, r: Tensor, n: Tensor) -> Tensor:
        row = rows[b, h, r]
        token = row // G
        seen = n >= 0  # all
        if is_causal:
            seen = seen & (n <= token)
        if allowed is not None:
            seen = seen & allowed[b * batch, (h * G + row % G) * head, token * query, n * key]
        return seen

    return sees


@dataclass(frozen=True)
class BlockCounts:
    """Blocks of queries and keys, over all sequences and key/value heads.

    Attributes:
        visited: by routed attention.
        dense: by attention with every head active.
    """

    visited: int
    dense: int

    @property
    def share(self) -> float:
        """visited / dense; no less than the share of active heads, and close to it if sequences are long."""
        return self.visited / self.dense if self.dense else 0.0


def flex_block_counts(
    gates: Tensor,
    Hkv: int,
    Nk: int,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    block: int = BLOCK,
) -> BlockCounts:
    """The blocks that the backend visits for `gates` `[B, Nq, H]`, and those of attention with every head active.

    Reads numbers from the device: for reports and tests.
    """
    G = gates.shape[2] // Hkv
    allowed = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = with_four_dims(attn_mask)
    visited, dense = (
        int(blocks_of(pack(used, Hkv), G, Nk, is_causal=is_causal, allowed=allowed, block=block)[0].sum())
        for used in (gates, torch.ones_like(gates))
    )
    return BlockCounts(visited, dense)
