"""The block mask of packed rows: which blocks of queries and keys FlexAttention visits, and which of them unmasked.

Made on the device from counts and positions, with static shapes: nothing waits for a number. Not for the attention
itself (`flex.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moh.attention.compaction import Compaction, compact

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Rows and keys of a block: FlexAttention's own choice, which its kernels' tiles divide."""


@dataclass(frozen=True)
class BlockCounts:
    """Blocks of queries and keys, over all sequences and key/value heads.

    Attributes:
        visited: what routed attention works through.
        dense: what it would with every head active.
    """

    visited: int
    dense: int

    @property
    def share(self) -> float:
        """visited / dense; no less than the share of active heads, and close to it if sequences are long."""
        return self.visited / self.dense if self.dense else 0.0


def block_mask_of(
    packed: Compaction,
    G: int,
    Nk: int,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    sliding_window: int | None = None,
    block: int = BLOCK,
) -> BlockMask:
    """The BlockMask `[B, Hkv, M, Nk]` of packed rows, G query heads per key/value head.

    Args:
        packed: from `compact`.
        G: query heads per key/value head.
        Nk: keys.
        is_causal: token t sees keys 0 to t.
        attn_mask: with 4 dimensions; an additive one hides nothing here.
        sliding_window: token t sees keys from t - sliding_window + 1 on; needs `is_causal`.
        block: rows and keys of a block.
    """
    from torch.nn.attention.flex_attention import BlockMask  # slow to import, and few calls need it

    hidden = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
    needed, whole = blocks_of(
        packed, G, Nk, is_causal=is_causal, allowed=hidden, sliding_window=sliding_window, block=block
    )
    part, part_at = _listed(needed & ~whole)
    full, full_at = _listed(whole)
    rows = packed.rows.to(torch.int32)
    mask_mod = _mask_mod(rows, G, is_causal, hidden, sliding_window)
    return BlockMask.from_kv_blocks(
        part, part_at, full, full_at, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(rows.shape[-1], Nk)
    )


def blocks_of(
    packed: Compaction,
    G: int,
    Nk: int,
    *,
    is_causal: bool,
    allowed: Tensor | None,
    sliding_window: int | None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """(needed, whole), bool `[B, Hkv, row blocks, key blocks]`: where some row sees some key, where every row all keys.

    `needed` may hold a block too many where a mask differs between the heads of a group; never one too few.
    """
    M = packed.rows.shape[-1]
    counts = packed.counts[..., None]  # [B, Hkv, 1]
    starts = torch.arange(0, M, block, device=counts.device)  # [row blocks]
    live = starts < counts
    last_row = torch.minimum(starts + block, counts).sub(1).clamp_min(0)
    first = (packed.rows[..., ::block] // G)[..., None]  # [B, Hkv, row blocks, 1]: tokens
    last = (packed.rows.gather(2, last_row) // G)[..., None]
    key = torch.arange(0, Nk, block, device=counts.device)  # the first of each block
    end = key + block - 1

    needed = live[..., None].expand(*live.shape, len(key))
    # Blocks that stick out of rows or keys have to be masked.
    whole = needed & (end < Nk) & (starts + block <= M)[:, None]
    if is_causal:
        needed, whole = needed & (key <= last), whole & (end <= first)
    if sliding_window is not None:
        needed, whole = needed & (end > first - sliding_window), whole & (key > last - sliding_window)
    if allowed is not None:
        some, every = _allowed_blocks(allowed, packed, G, Nk, first, last, block)
        needed, whole = needed & some, whole & every
    return needed, whole & needed


def _allowed_blocks(
    allowed: Tensor, packed: Compaction, G: int, Nk: int, first: Tensor, last: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Whether a bool mask lets some, and every, pair of tokens first to last and a block's keys see each other."""
    B, Hkv = packed.counts.shape
    heads, queries = allowed.shape[1:3]
    blocks = -(-Nk // block)
    padding = (0, blocks * block - Nk)
    allowed = allowed.expand(B, heads, queries, Nk)
    # [B, heads, queries, key blocks]; what lies beyond the last key neither allows nor forbids
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
    """(how many key blocks each row block has, which: those first), int32."""
    at = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), at.to(torch.int32)


def _mask_mod(
    rows: Tensor, G: int, is_causal: bool, allowed: Tensor | None, sliding_window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which key n packed row r sees, by the token that the row is of: what holds for all of them, composed."""
    window = sliding_window
    batch, head, query, key = (int(size > 1) for size in allowed.shape) if allowed is not None else (0, 0, 0, 0)

    def sees(b: Tensor, h: Tensor, r: Tensor, n: Tensor) -> Tensor:
        row = rows[b, h, r]
        token = row // G
        seen = n >= 0
        if is_causal:
            seen = seen & (n <= token)
        if window is not None:
            seen = seen & (n > token - window)
        if allowed is not None:
            seen = seen & allowed[b * batch, (h * G + row % G) * head, token * query, n * key]
        return seen

    return sees


def flex_block_counts(
    gates: Tensor,
    Hkv: int,
    Nk: int,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    sliding_window: int | None = None,
    block: int = BLOCK,
) -> BlockCounts:
    """The blocks that the backend visits for `gates` `[B, Nq, H]`, and those of attention with every head active.

    Reads numbers from the device: for reports and tests.
    """
    G = gates.shape[2] // Hkv
    allowed = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask[(None,) * (4 - attn_mask.dim())]
    visited, dense = (
        int(
            blocks_of(
                compact(used, Hkv), G, Nk, is_causal=is_causal, allowed=allowed, sliding_window=sliding_window,
                block=block,
            )[0].sum()
        )
        for used in (gates, torch.ones_like(gates))
    )  # fmt: skip
    return BlockCounts(visited, dense)
