"""Subject `core`: attention itself, forward and forward+backward; no projections, no routing.

Tensors are laid out as projections leave them, `[B, N, H, D]` in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Contender, active_heads, balanced_gates, ideal_heads, vary
from moh.attention import moh_attention

FORWARD = Case("core", "forward")
BOTH = Case("core", "forward+backward")

HUGE = 8 * 8192**2
"""Cases with more products of a query and a key than 8 heads on 8,192 tokens are skipped: minutes each, nothing new."""


def cases(grid: str) -> list[Case]:
    """The cases of a grid, each once."""
    if grid == "quick":
        small = replace(FORWARD, length=256)
        return [small, replace(small, causal=True), replace(small, mode="forward+backward")]
    if grid == "full":
        heads = ((8, 8), (8, 2), (16, 16), (16, 4), (32, 32), (32, 8))
        axes = (
            ("forward", "forward+backward"),
            ("float32", "bfloat16"),
            (False, True),
            (1, 8),
            heads,
            (64, 72, 96, 128),
            (128, 256, 512, 1024, 2048, 4096, 8192),
        )
        every = [
            Case("core", mode, batch, *h, length, width, dtype, causal)
            for mode, dtype, causal, batch, h, width, length in product(*axes)
        ]
        return _once([*cases("default"), *(case for case in every if case.pairs <= HUGE)])
    few = (0.25, 0.5, 1.0)
    long = [replace(FORWARD, length=8192, causal=causal, shares=(0.5, 1.0)) for causal in (False, True)]
    chosen = [FORWARD, *vary(FORWARD, length=(128, 256, 1024, 2048)), *vary(FORWARD, width=(72, 96, 128))]
    chosen += [replace(case, causal=True) for case in chosen]
    chosen += [
        *long,
        replace(FORWARD, heads=32, kv_heads=32),
        replace(FORWARD, heads=32, kv_heads=8),
        replace(FORWARD, heads=32, kv_heads=8, causal=True),
        replace(FORWARD, heads=16, kv_heads=16, length=256, batch=8),
        *vary(replace(FORWARD, dtype="bfloat16"), length=(256, 512, 1024)),
        replace(FORWARD, dtype="bfloat16", causal=True),
        replace(FORWARD, dtype="bfloat16", width=128),
        *(replace(BOTH, length=length, causal=c) for length in (256, 512, 1024) for c in (False, True)),
        *vary(replace(BOTH, shares=few), width=(128,), dtype=("bfloat16",)),
        replace(BOTH, heads=32, kv_heads=8, causal=True, shares=few),
    ]
    return _once(chosen)


def contenders(case: Case) -> list[Contender]:
    """Dense, masked, and for each share ours, ours with the `sdpa` backend, and the ideal."""
    B, N, H, D = case.batch, case.length, case.heads, case.width
    q = _heads(case, H)
    k, v = _heads(case, case.kv_heads), _heads(case, case.kv_heads)
    cotangent = torch.randn(B, N, H, D, dtype=case.torch_dtype)
    half = active_heads(0.5, H)
    found = [
        Contender("dense", _step(lambda: _dense(q, k, v, case), (q, k, v), cotangent, case)),
        _masked(case, q, k, v, cotangent, half),
    ]
    for share in case.shares:
        active = active_heads(share, H)
        gates = _gates(case, active)
        for name, backend in (("ours", "cpu"), ("ours (sdpa)", "sdpa")):
            run = _ours(case, q, k, v, gates, backend)
            found.append(Contender(name, _step(run, (q, k, v, gates), cotangent, case), share, active / H))
        kept = ideal_heads(share, case)
        if kept is not None:
            found.append(_ideal(case, share, *kept))
    return found


def _heads(case: Case, heads: int) -> Tensor:
    """`[B, heads, N, D]`, token-major in memory."""
    x = torch.randn(case.batch, case.length, heads, case.width, dtype=case.torch_dtype).transpose(1, 2)
    return x.requires_grad_(case.backward)


def _gates(case: Case, active: int) -> Tensor:
    gates = balanced_gates(case.batch, case.length, case.heads, active).to(case.torch_dtype)
    return gates.requires_grad_(case.backward)


def _dense(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=q.shape[1] > k.shape[1])
    return out.transpose(1, 2)  # [B, N, H, D]


def _ours(case: Case, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, backend: str) -> Callable[[], Tensor]:
    return lambda: moh_attention(q, k, v, gates, is_causal=case.causal, backend=backend)


def _masked(case: Case, q: Tensor, k: Tensor, v: Tensor, cotangent: Tensor, active: int) -> Contender:
    gates = _gates(case, active)
    run = _step(lambda: _dense(q, k, v, case) * gates[..., None], (q, k, v, gates), cotangent, case)
    return Contender("masked", run, 0.5, active / case.heads)


def _ideal(case: Case, share: float, heads: int, kv_heads: int) -> Contender:
    q, k, v = _heads(case, heads), _heads(case, kv_heads), _heads(case, kv_heads)
    cotangent = torch.randn(case.batch, case.length, heads, case.width, dtype=case.torch_dtype)
    run = _step(lambda: _dense(q, k, v, case), (q, k, v), cotangent, case)
    return Contender("ideal", run, share, heads / case.heads)


def _step(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor, case: Case
) -> Callable[[], object]:
    if case.backward:
        return lambda: torch.autograd.grad(forward(), leaves, cotangent)
    return forward


def _once(chosen: list[Case]) -> list[Case]:
    return list({case.key: case for case in reversed(chosen)}.values())[::-1]
