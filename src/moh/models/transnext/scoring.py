"""The parameters of TransNeXt's attention weights, and the definition of its attention.

Aggregated attention (arXiv 2311.17132, section 3), dense and weighted by the gates afterwards: slow, the
reference for every faster way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moh.models.transnext.architecture import Size


@dataclass(frozen=True)
class Scoring:
    """Parameters of one layer's attention, for images of one size.

    Attributes:
        size: height and width in tokens; N = height * width.
        embedding: `[H, D]`, added to the normalised query.
        temperature: `[H]`, positive, factor of the scores.
        length: `[N]`, factor of each query's scores, the logarithm of the number of keys that it sees; without gradient.
        pooled_bias: `[H, N, P]`, added to the scores of the pooled keys.
        tokens: `[H, D, W]` for a local window of W = window^2 places; `normalised query @ tokens + token_bias` is added
            to the weights of the neighbours after the softmax. W = 0 means no local window: plain attention.
        token_bias: `[H, W]`.
        local_bias: `[H, W]`, added to the scores of the neighbours, row by row.
    """

    size: Size
    embedding: Tensor
    temperature: Tensor
    length: Tensor
    pooled_bias: Tensor
    tokens: Tensor
    token_bias: Tensor
    local_bias: Tensor

    @property
    def window(self) -> int:
        """Width of the local window."""
        return math.isqrt(self.local_bias.shape[1])

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q `[B, N, H, D]` -> normalised, and shifted and scaled for the product with the keys."""
        unit = F.normalize(q, dim=-1)
        scale = self.length[:, None] * self.temperature  # [N, H]
        return unit, (unit + self.embedding) * scale[..., None]


def neighbours(size: Size, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(index, visible), both `[N, window^2]`: each token's neighbours row by row, and which of them are in the image."""
    height, width = size
    reach = torch.arange(window, device=device) - window // 2
    row = torch.arange(height, device=device)[:, None, None, None] + reach[:, None]  # [height, 1, window, 1]
    column = torch.arange(width, device=device)[:, None, None] + reach  # [width, 1, window]
    visible = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # [height, width, window, window]
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return index.flatten(2).flatten(0, 1), visible.flatten(2).flatten(0, 1)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, gates: Tensor, scoring: Scoring
) -> Tensor:
    """Aggregated attention by its definition; arguments and result as in `aggregated_attention`."""
    unit, scaled = scoring.queries(q)  # [B, N, H, D]
    index, visible = neighbours(scoring.size, scoring.window, q.device)  # [N, W]
    hidden = ~visible[:, None]  # [N, 1, W]
    local = torch.einsum("bnhd,bnwhd->bnhw", scaled, k[:, index]) + scoring.local_bias
    pooled = torch.einsum("bnhd,bphd->bnhp", scaled, pooled_k) + scoring.pooled_bias.transpose(0, 1)
    weights = torch.cat([local.masked_fill(hidden, -torch.inf), pooled], dim=-1).softmax(-1)
    local, pooled = weights.split([local.shape[-1], pooled.shape[-1]], dim=-1)
    extra = torch.einsum("bnhd,hdw->bnhw", unit, scoring.tokens) + scoring.token_bias
    local = local + extra.masked_fill(hidden, 0.0)
    heads = torch.einsum("bnhw,bnwhd->bnhd", local, v[:, index]) + torch.einsum("bnhp,bphd->bnhd", pooled, pooled_v)
    return torch.where((gates != 0)[..., None], heads, 0.0) * gates[..., None]
