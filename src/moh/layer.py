"""`MoHAttention`: multi-head attention in which each token chooses its heads (arXiv 2410.11842).

Self- and cross-attention over `[B, N, C]`, and what a language model of one's own adds to it: `RotaryEmbedding`, `KVCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moh.attention import moh_attention, project_output, project_queries, route, whole_layer
from moh.attention.call import hide, seen_by
from moh.config import MoHConfig
from moh.routing import RoutingInfo, build_router

Rotation = Callable[[Tensor, int], Tensor]
"""(queries or keys `[B, heads, N, D]`, position of their first token) -> the same, rotated."""


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (arXiv 2104.09864): channels i and i + D/2 turn by position * base^(-2i/D), as in Llama.

    Args:
        head_dim: D, the width of one head, even.
        base: of the frequencies.

    Raises:
        ValueError: `head_dim` is odd or below 2.

    Examples:
        >>> import torch, moh
        >>> layer = moh.MoHAttention(256, num_heads=8, shared_heads=2, active_heads=2)
        >>> rotate = moh.RotaryEmbedding(layer.head_dim)
        >>> layer(torch.randn(2, 10, 256), is_causal=True, rotate=rotate).shape
        torch.Size([2, 10, 256])
    """

    frequencies: Tensor

    def __init__(self, head_dim: int, base: float = 10_000.0, *, device: torch.device | None = None) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {head_dim}")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self.register_buffer("frequencies", base**-exponents, persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate `x` `[B, heads, N, D]`, whose first token has the position `start`; angles are in float32."""
        positions = torch.arange(start, start + x.shape[2], dtype=torch.float32, device=x.device)
        angles = positions[:, None] * self.frequencies  # [N, D / 2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KVCache:
    """Keys and values of one layer's earlier tokens, for generation; memory is taken once, at the first token.

    Args:
        max_length: tokens that it can hold.

    Attributes:
        length: tokens that it holds.
    """

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.length = 0
        self._kv: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, Hkv, N, D]`; returns those of all tokens so far, as views.

        Raises:
            ValueError: there is no room, another batch, width or dtype came before, or autograd records the call.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "a cache is for generation: call the model under torch.no_grad() or torch.inference_mode()"
            )
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds max_length = {self.max_length} tokens, got {end}")
        if self._kv is None:
            shape = (*k.shape[:2], self.max_length, k.shape[3])
            self._kv = k.new_empty(shape), v.new_empty(shape)
        for kept, new in zip(self._kv, (k, v), strict=True):
            sizes = (*kept.shape[:2], kept.shape[3]), (*new.shape[:2], new.shape[3])
            if sizes[0] != sizes[1] or kept.dtype != new.dtype:
                raise ValueError(
                    f"the cache has [B, Hkv, D] = {list(sizes[0])} of {kept.dtype}, got {list(sizes[1])} of {new.dtype}; "
                    "make a new one"
                )
            kept[:, :, self.length : end] = new
        self.length = end
        return self._kv[0][:, :, :end], self._kv[1][:, :, :end]


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
        qk_norm: RMS norms of queries and keys over the width of a head; not with a router that reads queries.
        window: a token sees at most this many keys, its own included; needs `is_causal`. None means all.
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
        qk_norm: bool = False,
        window: int | None = None,
        backend: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in (sizes | {"context_dim": context_dim}).items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
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
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 or None, got {window}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.attn_drop = attn_drop
        self.window = window
        self.backend = backend

        context_dim = dim if context_dim is None else context_dim
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=qkv_bias, **factory)
        self.router = build_router(config, dim, device=device, dtype=dtype)
        if qk_norm and self.router.reads_queries:
            raise ValueError(f"qk_norm makes all queries equally long, and router={router!r} reads their lengths")
        self.q_norm = nn.RMSNorm(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def config(self) -> MoHConfig:
        """The layer's heads and routing, as its router has them now."""
        return self.router.config

    @property
    def static_backend(self) -> str:
        """The backend that exports use, whose shapes don't depend on the chosen heads; "grouped" computes active heads alone."""
        return "reference" if self.router.heads_per_group is None else "grouped"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        rotate: Rotation | None = None,
        cache: KVCache | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, RoutingInfo]:
        """Attend from x to itself, to `context`, or to itself and the tokens in `cache`.

        Args:
            x: `[B, Nq, C]`.
            context: `[B, Nk, context_dim]` for cross-attention; None attends to x.
            attn_mask: broadcastable to `[B, h, Nq, Nk]`; bool (True = may be seen) or added to the scores.
            key_padding_mask: `[B, Nk]`, bool: True for real keys, False for padding.
            is_causal: a token sees the keys up to its own.
            rotate: gives queries and keys their positions, such as a `RotaryEmbedding`.
            cache: keys and values of earlier tokens, which x continues; x's are added. Nk counts all of them.
            return_routing: return the `RoutingInfo` too.

        Returns:
            `[B, Nq, C]`, or that and the routing.

        Raises:
            ValueError: `cache` or `rotate` with `context`, `window` without `is_causal`, or a mask of another shape.
        """
        if context is not None and (cache is not None or rotate is not None):
            raise ValueError("context must be None with cache or rotate, which belong to self-attention")
        if self.window is not None and not is_causal:
            raise ValueError(f"is_causal must be True in a layer with window={self.window}")
        share = self.router.usual_share()
        dropout = self.attn_drop if self.training else 0.0
        if self.router.reads_queries:
            q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))  # [B, Nq, h, D]
            routing = self.router(q=q)
        else:
            routing = route(self.router, x, self.backend)
            whole = whole_layer(
                x,
                routing.gates,
                (self.q_proj, self.k_proj, self.v_proj),
                self.proj,
                share,
                between=(self.q_norm, self.k_norm),
                special=(context, attn_mask, key_padding_mask, rotate, cache, self.window),
                dropout_p=dropout,
                is_causal=is_causal,
                backend=self.backend,
            )
            if whole is not None:
                dropped: Tensor = self.proj_drop(whole)
                return (dropped, routing) if return_routing else dropped
            q = project_queries(self.q_proj, x, routing.gates, share, self.backend)
        context = x if context is None else context
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(self.k_proj(context).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # [B, Hkv, Nk, D]
        v = self.v_proj(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        start = 0 if cache is None else cache.length
        if rotate is not None:
            q, k = rotate(q, start), rotate(k, start)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms and rotations compute in float32 under autocast
        if cache is not None:
            k, v = cache.update(k, v)
        attn_mask = _with_padding(attn_mask, key_padding_mask, x.shape[0], k.shape[2])
        if is_causal and (start or self.window is not None):  # the backends' own causal mask begins at the first key
            if x.shape[1] > 1 or self.window is not None:
                seen = _seen(start, x.shape[1], k.shape[2], self.window, x.device)
                attn_mask = hide(attn_mask, seen)
            is_causal = False
        heads = moh_attention(
            q,
            k,
            v,
            routing.gates,
            is_causal=is_causal,
            attn_mask=attn_mask,
            dropout_p=dropout,
            heads_per_group=self.router.heads_per_group,
            backend=self.backend,
        )  # [B, Nq, h, D]
        out: Tensor = self.proj_drop(project_output(self.proj, heads, routing.gates, share, self.backend))
        return (out, routing) if return_routing else out


def _seen(start: int, Nq: int, Nk: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys tokens see in causal attention with a window, bool `[Nq, Nk]`; the first token's position is `start`."""
    tokens = torch.arange(start, start + Nq, device=device)[:, None]
    seen = seen_by(tokens, Nk)
    return seen if window is None else seen & (torch.arange(Nk, device=device) > tokens - window)


def _with_padding(attn_mask: Tensor | None, key_padding_mask: Tensor | None, B: int, Nk: int) -> Tensor | None:
    if key_padding_mask is None:
        return attn_mask
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != (B, Nk):
        raise ValueError(
            f"key_padding_mask must be bool of shape [B, Nk] = {(B, Nk)}, "
            f"got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
        )
    return hide(attn_mask, key_padding_mask[:, None, None, :])  # [B, 1, 1, Nk]
