"""Subject `vision`: a stack of blocks of ViT-B's size (width 768, 12 heads, 197 tokens) with `MoHAttention`.

No patch embedding and no classifier: those cost the same in every model. Not a vision model of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Contender, active_heads, ideal_heads
from benchmarks.dense import DenseAttention, heads_of
from moh import MoHAttention
from moh.routing import build_router

BASE = Case("vision", "forward", heads=12, kv_heads=12, length=197, router="two_stage", layers=12)


def cases(grid: str) -> list[Case]:
    """The cases of a grid, each once."""
    if grid == "quick":
        return [replace(BASE, layers=2, shares=(0.5, 1.0))]
    large = replace(BASE, batch=8, shares=(0.5, 0.75, 1.0))
    return [BASE, large, replace(BASE, mode="training", shares=(0.5, 0.75, 1.0))] + (
        [replace(BASE, dtype="bfloat16"), replace(large, mode="training")] if grid == "full" else []
    )


class Block(nn.Module):
    """A pre-norm block: attention, then a network four times as wide."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def contenders(case: Case) -> list[Contender]:
    """Dense, masked, and for each share ours and the ideal."""
    H, D, dim = case.heads, case.width, case.heads * case.width
    x = torch.randn(case.batch, case.length, dim, dtype=case.torch_dtype)

    def stack(attention: Callable[[], nn.Module]) -> Callable[[], object]:
        model = nn.Sequential(*(Block(dim, attention()) for _ in range(case.layers))).to(case.torch_dtype)
        return _step(model.train(case.backward), x, case)

    def dense(heads: int, routed: int | None = None) -> DenseAttention:
        router = None if routed is None else build_router(heads_of(routed, H, case.router or ""), dim)
        return DenseAttention(dim, heads, heads, D, router=router, qkv_bias=True)

    def ours(active: int) -> MoHAttention:
        c = heads_of(active, H, case.router or "")
        heads = {"shared_heads": c.num_shared, "active_heads": c.active_heads}
        return MoHAttention(dim, H, router=c.router, qkv_bias=True, backend="cpu", **heads)  # type: ignore[arg-type]

    half = active_heads(0.5, H)
    found = [
        Contender("dense", stack(lambda: dense(H))),
        Contender("masked", stack(lambda: dense(H, half)), 0.5, half / H),
    ]
    for share in case.shares:
        active = active_heads(share, H)
        found.append(Contender("ours", stack(lambda active=active: ours(active)), share, active / H))  # type: ignore[misc]
        kept = ideal_heads(share, case)
        if kept is not None:
            found.append(Contender("ideal", stack(lambda kept=kept: dense(kept[0])), share, kept[0] / H))  # type: ignore[misc]
    return found


def _step(model: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    if not case.backward:
        return lambda: model(x)

    def train() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    return train
