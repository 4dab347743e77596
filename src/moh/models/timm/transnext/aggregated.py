"""What besides queries, keys and values decides TransNeXt's attention weights: the definition, and its fast path.

The fast path is the C++ operator for active (token, head) pairs where it can be used, else PyTorch's operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moh.attention import cpu
from moh.attention.call import unsupported_dtype, unsupported_options
from moh.models.timm.transnext.architecture import Size


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


BACKENDS = ("cpu", "sdpa", "reference")
"""Named as for `moh.moh_attention`: C++, PyTorch (here every head, then weighted), the definition."""


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    gates: Tensor,
    scoring: Scoring,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention to a window of neighbours and to pooled keys under one softmax, in which each token uses some heads.

    Args:
        q: queries `[B, N, H, D]`, not yet normalised; any finite values where the gate is 0.
        k: normalised keys `[B, N, H, D]`; without a local window, `[B, 0, H, D]`.
        v: values, as k.
        pooled_k: normalised keys `[B, P, H, D]` that every query sees.
        pooled_v: values `[B, P, H, D]`.
        gates: `[B, N, H]`, each head's weight for each token; exactly 0 means inactive.
        scoring: the layer's parameters.
        dropout_p: probability of dropping a weight of the softmax.
        backend: one of `BACKENDS`; None takes C++ if it supports the call, else PyTorch.

    Returns:
        `[B, N, H, D]` in q's dtype, weighted by the gates, 0 where inactive. Differentiable in all tensors but
        `scoring.length`; the gradient of a gate that is 0 is defined as 0.

    Raises:
        ValueError: the backend is unknown, or does not support the call; names the reason.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend in (None, "cpu"):
        reason = _unsupported(q, scoring, dropout_p)
        if reason is None:
            return _compiled(q, k, v, pooled_k, pooled_v, gates, scoring)
        if backend == "cpu":
            raise ValueError(f"backend 'cpu' can't handle this call: {reason}")
    if backend == "reference" and not dropout_p:
        return reference_attention(q, k, v, pooled_k, pooled_v, gates, scoring)
    if backend == "reference":
        raise ValueError("backend 'reference' can't handle this call: it has no dropout of attention weights")
    return _dense(q, k, v, pooled_k, pooled_v, gates, scoring, dropout_p)


def _unsupported(q: Tensor, scoring: Scoring, dropout_p: float) -> str | None:
    """Why the C++ operator can't handle the call, or None."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    if (reason := unsupported_dtype(q)) is not None:
        return reason
    if (reason := unsupported_options(None, dropout_p)) is not None:
        return reason
    if scoring.window > cpu.MAX_WINDOW:
        return f"it supports local windows up to {cpu.MAX_WINDOW} x {cpu.MAX_WINDOW}, not {scoring.window}"
    return cpu.unavailable()


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, gates: Tensor, scoring: Scoring
) -> Tensor:
    s = scoring
    inputs = (q, k, v, pooled_k, pooled_v, gates)
    parameters = (s.embedding, s.temperature, s.length, s.tokens, s.token_bias, s.local_bias, s.pooled_bias)
    out: Tensor = torch.ops.moh.cpu_aggregated_attention(*(t.float() for t in (*inputs, *parameters)), *s.size)
    return out.to(q.dtype)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    gates: Tensor,
    scoring: Scoring,
    dropout_p: float,
) -> Tensor:
    """Every head, then weighted. The neighbours are `window^2` shifted views of the padded image, read one by one."""
    unit, scaled = scoring.queries(q)
    places = scoring.window**2
    scores = (scaled.transpose(1, 2) @ pooled_k.permute(0, 2, 3, 1) + scoring.pooled_bias).transpose(1, 2)
    if places:
        local = torch.stack([(scaled * shifted).sum(-1) for shifted in _shifted(k, scoring)], dim=-1)
        visible = neighbours(scoring.size, scoring.window, q.device)[1][:, None]  # [N, 1, W]
        local = (local + scoring.local_bias).masked_fill(~visible, -torch.inf)
        scores = torch.cat([local, scores], dim=-1)  # [B, N, H, W + P]
    weights = F.dropout(scores.softmax(-1), dropout_p)
    heads = (weights[..., places:].transpose(1, 2) @ pooled_v.transpose(1, 2)).transpose(1, 2)  # [B, N, H, D]
    if places:
        extra = (unit.transpose(1, 2) @ scoring.tokens).transpose(1, 2) + scoring.token_bias
        local = weights[..., :places] + extra  # outside of the image the shifted values are 0
        for place, shifted in enumerate(_shifted(v, scoring)):
            heads = heads + local[..., place : place + 1] * shifted
    return torch.where((gates != 0)[..., None], heads, 0.0) * gates[..., None]


def _shifted(x: Tensor, scoring: Scoring) -> list[Tensor]:
    """For each place of the window, every token's neighbour at that place, `[B, N, H, D]`; 0 outside of the image."""
    (B, N, H, D), (height, width), window = x.shape, scoring.size, scoring.window
    reach = window // 2
    image = F.pad(x.reshape(B, height, width, H * D), (0, 0, reach, reach, reach, reach))
    corners = [(i, j) for i in range(window) for j in range(window)]
    return [image[:, i : i + height, j : j + width].reshape(B, N, H, D) for i, j in corners]
