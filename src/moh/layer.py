"""`MoHAttention`: multi-head attention in which each token chooses its heads (arXiv 2410.11842).

Self- and cross-attention over `[B, N, C]`. Positions (rotary, biases) and norms belong to models, see `moh.models`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moh.attention import moh_attention, project_output, route_and_project
from moh.attention.call import hide
from moh.config import MoHConfig
from moh.routing import RoutingInfo, build_router


class MoHAttention(nn.Module):
    """Mixture-of-Head attention, `MoH(x_t) = sum_i g_i(x_t) H_i(x_t) W_O^i`.

    Args:
        dim: C, the width of input and output.
        num_heads, shared_heads, active_heads, router, routing_unit: h, h_s, k and how tokens choose (`moh.MoHConfig`).
        num_kv_heads: key/value heads for grouped-query attention; None means `num_heads`.
        head_dim: D, the width of one head; None means `dim // num_heads`. `num_heads * head_dim` may differ from `dim`.
        context_dim: width of the keys' and values' input in cross-attention; None means `dim`.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        attn_drop: dropout of attention weights, in training only.
        proj_drop: dropout of the output, in training only.
        backend: attention backend, None for the fastest that supports the call (`moh.attention.backends`).

    Raises:
        ValueError: sizes don't fit each other; the message names the argument.

    Examples:
        >>> import torch, moh
        >>> layer = moh.MoHAttention(256, num_heads=8, shared_heads=2, active_heads=2)  # 4 of 8 heads
        >>> layer(torch.randn(2, 10, 256), is_causal=True).shape
        torch.Size([2, 10, 256])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        shared_heads: int | Sequence[int],
        active_heads: int,
        router: str = "two_stage",
        routing_unit: str = "head",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        config = MoHConfig(
            num_heads,
            shared_heads,
            active_heads,
            router,
            routing_unit=routing_unit,
            kv_heads=None if routing_unit == "head" else num_kv_heads,
        )
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"dim must be a multiple of num_heads = {num_heads} unless head_dim is given, got {dim}"
                )
            head_dim = dim // num_heads
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop must be at least 0 and below 1, got {attn_drop}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.attn_drop = attn_drop
        self.backend = backend

        context_dim = dim if context_dim is None else context_dim
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=qkv_bias, **factory)
        self.router = build_router(config, dim, device=device, dtype=dtype)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def config(self) -> MoHConfig:
        """The layer's heads and routing, as its router has them now."""
        return self.router.config

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, RoutingInfo]:
        """Attend from x to itself or to `context`.

        Args:
            x: `[B, Nq, C]`.
            context: `[B, Nk, context_dim]` for cross-attention; None attends to x.
            attn_mask: broadcastable to `[B, h, Nq, Nk]`; bool (True = may be seen) or added to the scores.
            key_padding_mask: `[B, Nk]`, bool: True for real keys, False for padding.
            is_causal: token i sees keys 0 to i.
            return_routing: return the `RoutingInfo` too.

        Returns:
            `[B, Nq, C]`, or that and the routing.
        """
        context = x if context is None else context
        B, Nk = context.shape[:2]
        share = self.config.share
        routing, q = route_and_project(self.router, self.q_proj, x, self.backend)  # q: [B, Nq, h, D]
        k = self.k_proj(context).view(B, Nk, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(context).view(B, Nk, self.num_kv_heads, self.head_dim).transpose(1, 2)
        heads = moh_attention(
            q.transpose(1, 2),
            k,
            v,
            routing.gates,
            is_causal=is_causal,
            attn_mask=_with_padding(attn_mask, key_padding_mask, context),
            dropout_p=self.attn_drop if self.training else 0.0,
            heads_per_group=self.config.heads_per_group,
            backend=self.backend,
        )  # [B, Nq, h, D]
        out: Tensor = self.proj_drop(project_output(self.proj, heads, routing.gates, share, self.backend))
        return (out, routing) if return_routing else out


def _with_padding(attn_mask: Tensor | None, key_padding_mask: Tensor | None, context: Tensor) -> Tensor | None:
    if key_padding_mask is None:
        return attn_mask
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != context.shape[:2]:
        raise ValueError(
            f"key_padding_mask must be bool of shape [B, Nk] = {tuple(context.shape[:2])}, "
            f"got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
        )
    return hide(attn_mask, key_padding_mask[:, None, None, :])  # [B, 1, 1, Nk]
