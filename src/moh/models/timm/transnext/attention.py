"""TransNeXt's two kinds of attention with Mixture-of-Head routing (arXiv 2311.17132, section 3; arXiv 2410.11842).

Both normalise queries and keys, learn a temperature and a query embedding, and scale scores by the logarithm of how
many keys a query sees. The modules and their parameters are here, the computation is in `aggregated.py`. Query and output
projections are dense: at head width 24, projecting only active heads is not faster (docs/kernel.md).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.models.timm.transnext.aggregated import Scoring, aggregated_attention
from moh.models.timm.transnext.architecture import PositionBias, Size, visible_neighbours
from moh.routing import build_router

START_TEMPERATURE = 1 / 0.24
"""softplus(temperature) before training."""


class CosineAttention(nn.Module):
    """What both kinds share: routing, temperature, query embedding, position bias, output projection.

    Args:
        dim: C, width of input and output.
        num_heads: h.
        config: heads and routing; None uses every head of every token, without a router.
        ratio: tokens along each axis per key that has a position bias.
        trained_size: height and width of the training images, in tokens.
        attn_drop: dropout of attention weights, in training only.
        proj_drop: dropout of the output, in training only.
        backend: one of `moh.models.timm.transnext.aggregated.BACKENDS`, None for the fastest that supports the call.

    Attributes:
        static_backend: the one that exports use, whose shapes don't depend on the chosen heads.
    """

    static_backend: ClassVar[str] = "sdpa"  # computes all heads; OpenVINO can't compile the definition

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        config: MoHConfig | None,
        ratio: int,
        trained_size: Size,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attn_drop = attn_drop
        self.backend = backend
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **factory))
        self.position_bias = PositionBias(num_heads, ratio=ratio, trained_size=trained_size, **factory)
        self.router = build_router(config, dim, **factory) if config is not None else None
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_weights(self) -> None:
        """Initialise the parameters that are not in a submodule."""
        nn.init.constant_(self.temperature, math.log(math.expm1(START_TEMPERATURE)))  # the inverse of softplus
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def gates(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> each head's weight for each token, `[B, N, h]`."""
        if self.router is None:
            return x.new_ones(*x.shape[:2], self.num_heads)
        gates: Tensor = self.router(x).gates
        return gates

    def scoring(self, size: Size, keys: Tensor, **local: Tensor) -> Scoring:
        """Parameters for images of this size; `keys` `[N]` is how many keys each query sees."""
        temperature = F.softplus(self.temperature).flatten()
        return Scoring(
            size=size,
            embedding=self.query_embedding.flatten(1),
            temperature=temperature,
            length=keys.log().to(temperature.dtype),
            pooled_bias=self.position_bias(size),
            **local,
        )

    def join(self, heads: Tensor) -> Tensor:
        """Weighted heads `[B, N, h, D]` -> output `[B, N, C]`."""
        out: Tensor = self.proj_drop(self.proj(heads.flatten(2)))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N, h, D]`."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim)

    def _dropout_p(self) -> float:
        return self.attn_drop if self.training else 0.0


class AggregatedAttention(CosineAttention):
    """Attention to a window of neighbours and to pooled keys, under one softmax.

    Args:
        window_size: width of the local window, odd.
        qkv_bias: biases of the query, key and value projections.
        options: those of `CosineAttention`; `ratio` is how many tokens along each axis make a pooled key.
    """

    def __init__(self, dim: int, *, window_size: int = 3, qkv_bias: bool = True, **options: Any) -> None:
        super().__init__(dim, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        H, D, places = self.num_heads, self.head_dim, window_size**2
        self.window_size = window_size
        self.ratio: int = options["ratio"]
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.sr = nn.Conv2d(dim, dim, kernel_size=1, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(H, places, **factory))
        self.learnable_tokens = nn.Parameter(torch.empty(H, D, places, **factory))
        self.learnable_bias = nn.Parameter(torch.empty(H, 1, places, **factory))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`[B, N, C]` with N = height * width -> `[B, N, C]`."""
        gates = self.gates(x)
        q = self._heads(self.q(x))  # [B, N, h, D]
        k, v = map(self._heads, self.kv(x).split(self.dim, dim=-1))
        pooled_k, pooled_v = map(self._heads, self.kv(self._pool(x, size)).split(self.dim, dim=-1))  # [B, P, h, D]
        heads = aggregated_attention(
            q,
            F.normalize(k, dim=-1),
            v,
            F.normalize(pooled_k, dim=-1),
            pooled_v,
            gates,
            self.scoring(
                size,
                visible_neighbours(size, self.window_size, x.device) + pooled_k.shape[1],
                tokens=self.learnable_tokens,
                token_bias=self.learnable_bias.flatten(1),
                local_bias=self.relative_pos_bias_local,
            ),
            dropout_p=self._dropout_p(),
            backend=self.backend,
        )
        return self.join(heads)

    def _pool(self, x: Tensor, size: Size) -> Tensor:
        """What pooled keys and values are made from, `[B, P, C]`: means of `ratio x ratio` tokens."""
        height, width = (length // self.ratio for length in size)
        mixed = F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias))
        blocks = mixed.view(x.shape[0], height, self.ratio, width, self.ratio, self.dim)
        out: Tensor = self.norm(blocks.mean((2, 4)).flatten(1, 2))
        return out


class PlainAttention(CosineAttention):
    """Attention to all tokens: aggregated attention without a window, every token a key.

    Args:
        qkv_bias: biases of the query, key and value projections.
        options: those of `CosineAttention` except `ratio`.
    """

    def __init__(self, dim: int, *, qkv_bias: bool = True, **options: Any) -> None:
        super().__init__(dim, ratio=1, **options)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=options.get("device"), dtype=options.get("dtype"))

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`[B, N, C]` with N = height * width -> `[B, N, C]`."""
        B, N, _ = x.shape
        gates = self.gates(x)
        q, k, v = map(self._heads, self.qkv(x).split(self.dim, dim=-1))  # [B, N, h, D]
        no_keys = q.new_empty(B, 0, self.num_heads, self.head_dim)
        no_places = q.new_empty(self.num_heads, 0)
        heads = aggregated_attention(
            q,
            no_keys,
            no_keys,
            F.normalize(k, dim=-1),
            v,
            gates,
            self.scoring(
                size,
                torch.full((N,), float(N), device=x.device),
                tokens=q.new_empty(self.num_heads, self.head_dim, 0),
                token_bias=no_places,
                local_bias=no_places,
            ),
            dropout_p=self._dropout_p(),
            backend=self.backend,
        )
        return self.join(heads)
