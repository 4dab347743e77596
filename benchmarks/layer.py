"""Subject `layer`: a whole `MoHAttention` with projections and routing, and the routing's part of its time.

Routers have random weights: tokens spread over heads about evenly. One in eight heads is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Contender, active_heads, ideal_heads
from benchmarks.dense import DenseAttention, heads_of
from moh import MoHAttention
from moh.routing import build_router

BASE = Case("layer", "forward", heads=32, kv_heads=32, causal=True, router="linear")


def cases(grid: str) -> list[Case]:
    """The cases of a grid, each once."""
    if grid == "quick":
        return [replace(BASE, heads=8, kv_heads=2, length=256)]
    if grid == "full":
        axes = (
            ("forward", "forward+backward"),
            ("float32", "bfloat16"),
            ("linear", "two_stage"),
            ((32, 32, 64), (32, 8, 64), (16, 16, 128), (16, 4, 128)),
            (128, 512, 2048),
        )
        return [
            Case("layer", mode, 1, *heads[:2], length, heads[2], dtype, True, router)
            for mode, dtype, router, heads, length in product(*axes)
        ]
    some = replace(BASE, shares=(0.25, 0.5, 1.0))
    both = replace(some, mode="forward+backward")
    return [
        BASE,
        replace(BASE, kv_heads=8),
        replace(some, router="two_stage"),
        replace(some, kv_heads=8, router="two_stage"),
        replace(some, dtype="bfloat16"),
        replace(some, kv_heads=8, dtype="bfloat16"),
        replace(some, causal=False),
        both,
        replace(both, kv_heads=8),
    ]


def contenders(case: Case) -> list[Contender]:
    """Dense, masked, and for each share ours and the ideal; the router alone at half of the heads."""
    H, width, dim = case.heads, case.width, case.heads * case.width
    assert case.router is not None
    x = torch.randn(case.batch, case.length, dim, dtype=case.torch_dtype, requires_grad=case.backward)

    def dense(heads: int, kv_heads: int) -> DenseAttention:
        return DenseAttention(dim, heads, kv_heads, width)

    def ours(active: int) -> MoHAttention:
        config = heads_of(active, H, case.router or "")
        return MoHAttention(
            dim,
            H,
            shared_heads=config.shared_heads,
            active_heads=config.active_heads,
            router=config.router,
            num_kv_heads=case.kv_heads,
            head_dim=width,
            backend="cpu",
        )

    half = active_heads(0.5, H)
    router = build_router(heads_of(half, H, case.router), dim)
    masked = DenseAttention(dim, H, case.kv_heads, width, router=router)
    routing = router.to(case.torch_dtype)
    found = [
        Contender("dense", _step(dense(H, case.kv_heads), x, case)),
        Contender("masked", _step(masked, x, case), 0.5, half / H),
        Contender("routing", lambda: routing(x), 0.5, half / H),
    ]
    for share in case.shares:
        active = active_heads(share, H)
        found.append(Contender("ours", _step(ours(active), x, case), share, active / H))
        kept = ideal_heads(share, case)
        if kept is not None:
            found.append(Contender("ideal", _step(dense(*kept), x, case), share, kept[0] / H))
    return found


def _step(layer: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    layer = layer.to(case.torch_dtype).train(case.backward)
    if not case.backward:
        return lambda: layer(x, is_causal=case.causal)
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn_like(x)
    # Shared heads alone leave the router's rows of the other heads without a gradient
    return lambda: torch.autograd.grad(layer(x, is_causal=case.causal), leaves, cotangent, allow_unused=True)
