"""Dense counterparts of `MoHAttention`, for comparison: all heads, fewer heads, or all heads, then weighted.

`DenseAttention` has the names and the shapes of `moh.MoHAttention`; nothing here is part of the package.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moh import MoHConfig
from moh.routing import Router


class DenseAttention(nn.Module):
    """Multi-head attention with PyTorch's function; with a router, each head's output is then weighted by its gate."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, width: int, *, router: Router | None = None, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.kv_heads, self.width = kv_heads, width
        self.q_proj = nn.Linear(dim, heads * width, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, kv_heads * width, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, kv_heads * width, bias=qkv_bias)
        self.proj = nn.Linear(heads * width, dim)
        self.router = router

    def forward(self, x: Tensor, *, is_causal: bool = False) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=is_causal,
            enable_gqa=q.shape[2] > self.kv_heads,
        ).transpose(1, 2)  # [B, N, H, D]
        if self.router is not None:
            heads = heads * self.router(x, q).gates[..., None]
        out: Tensor = self.proj(heads.flatten(2))
        return out


def heads_of(
    share_heads: int, heads: int, router: str, *, routing_unit: str = "head", kv_heads: int | None = None
) -> MoHConfig:
    """A layer's heads with `share_heads` of them in use: one in eight shared if there are enough.

    Where tokens choose groups of heads, the shared ones are rounded down to what the unit allows.
    """
    unit: dict[str, Any] = {} if routing_unit == "head" else {"routing_unit": routing_unit, "kv_heads": kv_heads}
    step = MoHConfig(heads, 0, heads, router, **unit).step
    shared = min(max(1, heads // 8), share_heads) // step * step
    return MoHConfig(heads, shared, share_heads - shared, router, **unit)


def weigh_heads(attention: nn.Module, projection: nn.Module, router: Router) -> None:
    """Weight each head's output by its gate before the output projection, as published MoH code does.

    Args:
        attention: dense, called with its input `[B, N, C]` first or as `hidden_states`.
        projection: its output projection.
        router: routes by that input.
    """
    gates: list[Tensor] = []

    def route(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        gates[:] = [router(args[0] if args else kwargs["hidden_states"]).gates]

    def weigh(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (gates[0].shape[-1], -1))  # [B, N, H, D]
        return ((heads * gates[0].view(*heads.shape[:-1], 1)).flatten(-2),)

    attention.register_forward_pre_hook(route, with_kwargs=True)
    projection.register_forward_pre_hook(weigh)
