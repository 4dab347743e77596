"""TransNeXt's parts other than attention: convolutional GLU, overlapping patch embedding, block, stage (arXiv 2311.17132)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from moh.models.timm.transnext.architecture import Size
from moh.models.timm.transnext.attention import AggregatedAttention, PlainAttention


class ConvolutionalGLU(nn.Module):
    """`W_2 (gelu(conv(W_a x)) * W_b x)` with a depthwise 3x3 convolution; W_a and W_b are the halves of `fc1`.

    Args:
        dim: C, width of input and output.
        hidden: width that a plain MLP would have; the gated one gets two thirds of it, for about as many parameters.
        drop: dropout of the hidden layer and of the output.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = 2 * hidden // 3
        self.fc1 = nn.Linear(dim, 2 * hidden, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`, N = height * width."""
        gate, value = self.fc1(x).chunk(2, dim=-1)  # [B, N, hidden]
        image = gate.transpose(1, 2).unflatten(2, size)  # [B, hidden, height, width]
        gate = self.dwconv(image).flatten(2).transpose(1, 2)
        x = self.drop(F.gelu(gate) * value)
        out: Tensor = self.drop(self.fc2(x))
        return out


class OverlapPatchEmbed(nn.Module):
    """Image or feature map -> tokens, by a convolution whose kernel is wider than its stride."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        kernel_size: int,
        stride: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """`[B, in_chans, H, W]` -> tokens `[B, N, dim]` and their height and width."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Block(nn.Module):
    """Pre-norm transformer block: attention and convolutional GLU, each with stochastic depth."""

    def __init__(
        self,
        dim: int,
        attn: AggregatedAttention | PlainAttention,
        *,
        hidden: int,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.mlp = ConvolutionalGLU(dim, hidden, drop=drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x), size))
        return out


class Stage(nn.Module):
    """Patch embedding, blocks and norm of one resolution."""

    def __init__(self, patch_embed: OverlapPatchEmbed, blocks: Sequence[Block], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` -> `[B, C, H / stride, W / stride]`."""
        x, size = self.patch_embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, size)
            else:
                x = block(x, size)
        return self.norm(x).transpose(1, 2).unflatten(2, size)  # type: ignore[no-any-return]
