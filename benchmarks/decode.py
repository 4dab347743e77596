"""Subject `decode`: attention of one new token to a long cache of keys and values.

Each call reads another cache, as another layer of a model would: together they are larger than the processor's caches,
so that keys and values come from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Contender, active_heads, balanced_gates, ideal_heads, in_turn, vary
from moh.attention import moh_attention

BASE = Case("decode", "decode", heads=32, kv_heads=8, length=4096)

CACHE_BYTES = 256 * 2**20
"""Bytes of all caches together: several times a server's last-level cache per core, but little of its memory."""

DRAWS = 16
"""Several routings take turns: with a single one, chance would decide how many key/value heads are read."""


def cases(grid: str) -> list[Case]:
    """The cases of a grid, each once."""
    if grid == "quick":
        return [replace(BASE, length=1024)]
    if grid == "full":
        axes = (
            ("float32", "bfloat16"),
            (1, 8),
            ((8, 8), (8, 2), (32, 32), (32, 8)),
            (64, 72, 96, 128),
            (512, 1024, 2048, 4096, 8192),
        )
        return [
            Case("decode", "decode", batch, *heads, length, width, dtype)
            for dtype, batch, heads, width, length in product(*axes)
        ]
    return [
        BASE,
        *vary(BASE, length=(512, 1024, 8192), width=(128,), batch=(8,), dtype=("bfloat16",)),
        replace(BASE, width=128, dtype="bfloat16"),
        replace(BASE, heads=8),
    ]


def contenders(case: Case) -> list[Contender]:
    """Dense, masked, and for each share ours and the ideal."""
    B, H, D = case.batch, case.heads, case.width
    shape = (B, case.kv_heads, case.length, D)
    one = 2 * B * case.kv_heads * case.length * D * case.torch_dtype.itemsize
    caches = [
        torch.randn(2, *shape, dtype=case.torch_dtype) for _ in range(min(256, -(-CACHE_BYTES // one)))
    ]  # of [keys and values, B, Hkv, N, D]
    q = torch.randn(B, H, 1, D, dtype=case.torch_dtype)

    def gates(active: int) -> Tensor:
        return torch.stack([balanced_gates(B, 1, H, active, seed=s) for s in range(DRAWS)]).to(case.torch_dtype)

    def dense(heads: int, kv_heads: int) -> Callable[[], Tensor]:
        # Fewer key/value heads: views of the same caches, whose heads are contiguous
        turn, q_kept, grouped = in_turn([c[:, :, :kv_heads] for c in caches]), q[:, :heads], heads > kv_heads
        return lambda: F.scaled_dot_product_attention(q_kept, *next(turn), enable_gqa=grouped).transpose(1, 2)

    def masked(active: int) -> Callable[[], Tensor]:
        attend, draws = dense(H, case.kv_heads), in_turn(list(gates(active)))
        return lambda: attend() * next(draws)[..., None]

    def ours(active: int) -> Callable[[], Tensor]:
        turn, draws = in_turn(caches), in_turn(list(gates(active)))
        return lambda: moh_attention(q, *next(turn), next(draws), backend="cpu")

    half = active_heads(0.5, H)
    found = [Contender("dense", dense(H, case.kv_heads)), Contender("masked", masked(half), 0.5, half / H)]
    for share in case.shares:
        active = active_heads(share, H)
        found.append(Contender("ours", ours(active), share, active / H))
        kept = ideal_heads(share, case)
        if kept is not None:
            found.append(Contender("ideal", dense(*kept), share, kept[0] / H))
    return found
