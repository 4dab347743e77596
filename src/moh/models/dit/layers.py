"""The parts of a diffusion transformer: the block (adaLN-Zero, arXiv 2212.09748, section 3.2) and its two attentions.

MoH attention is `moh.MoHAttention`; the dense one here is the control's. Whole models are in `transformer.py`.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.layer import MoHAttention

MODULATION_EPS = 1e-6
"""Epsilon of the norms inside diffusers' adaptive norms, of the published models, and of the last norm."""


class DenseAttention(nn.Module):
    """Multi-head self-attention over `[B, N, C]`; tensors are named as in `moh.MoHAttention`."""

    def __init__(self, dim: int, num_heads: int, *, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim)
        self.k_proj = nn.Linear(dim, num_heads * head_dim)
        self.v_proj = nn.Linear(dim, num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        q, k, v = (p(x).unflatten(-1, heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        z = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, D]
        out: Tensor = self.proj(z.transpose(1, 2).flatten(2))
        return out


class MoHDiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning.

    Args:
        dim: C.
        heads: heads and routing, or the number of heads of dense attention.
        head_dim: D.
        norm_eps: epsilon of the norm before the MLP.
        backend: attention backend of MoH, None for the fastest.
    """

    def __init__(
        self, dim: int, heads: MoHConfig | int, *, head_dim: int, norm_eps: float, backend: str | None
    ) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn: DenseAttention | MoHAttention
        if isinstance(heads, int):
            self.attn = DenseAttention(dim, heads, head_dim=head_dim)
        else:
            self.attn = MoHAttention(
                dim,
                heads.num_heads,
                shared_heads=heads.shared_heads,
                active_heads=heads.active_heads,
                router=heads.router,
                head_dim=head_dim,
                qkv_bias=True,
                backend=backend,
            )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def init_weights(self) -> None:
        """Start as the identity: nothing is added until the modulation is trained."""
        q, k, v = (p.weight for p in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj))
        # The published models draw the three as one matrix, whose larger fan-out makes them smaller.
        bound = math.sqrt(6 / (q.shape[1] + q.shape[0] + k.shape[0] + v.shape[0]))
        for weight in (q, k, v):
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.norm1.linear.weight)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x `[B, N, C]`, conditioning `[B, C]` -> `[B, N, C]`."""
        normed, gate_attn, shift, scale, gate_ff = self.norm1(x, emb=conditioning)  # [B, N, C], then [B, C] each
        x = x + gate_attn[:, None] * self.attn(normed)
        x = x + gate_ff[:, None] * self.ff(modulate(self.norm2(x), shift, scale))
        return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x `[B, N, C]`, shifted and scaled per image; shift and scale `[B, C]`."""
    return x * (1 + scale[:, None]) + shift[:, None]
