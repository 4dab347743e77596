"""Backend `flex`: routed attention by PyTorch's FlexAttention, active rows at the front and blocks without work left out.

The block mask is in `flex_blocks.py`. On the CPU FlexAttention has a forward pass alone, and the backend is never
chosen: there it is for checks.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moh.attention.compaction import compact, rows_of, token_major
from moh.attention.flex_blocks import block_mask_of
from moh.attention.refusals import unserved_dtype, unserved_options

MIN_WIDTH = 16
"""FlexAttention's kernels multiply tiles at least this wide."""
MAX_WIDTH = 256


def flex_routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """Routed attention by FlexAttention; arguments and result as in `moh.attention.moh_attention`."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import, and few calls need it

    Nq, Hkv = q.shape[2], k.shape[1]
    G = q.shape[1] // Hkv
    packed = compact(gates.detach(), Hkv)
    mask = None if attn_mask is None else attn_mask.detach()[(None,) * (4 - attn_mask.dim())]
    blocks = block_mask_of(packed, G, k.shape[2], is_causal=is_causal, attn_mask=mask, sliding_window=sliding_window)
    score_mod = None
    if mask is not None and mask.dtype != torch.bool:
        score_mod = _bias_of(mask, packed.rows.to(torch.int32), G)

    live = torch.arange(Nq * G, device=q.device) < packed.counts[..., None]  # [B, Hkv, M]
    # What is inactive counts as 0, before and after: a NaN in it reaches neither output nor gradients.
    q_rows = rows_of(q, Hkv).gather(2, packed.rows[..., None].expand(-1, -1, -1, q.shape[-1]))
    q_rows = torch.where(live[..., None], q_rows, 0.0)  # [B, Hkv, M, D]
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    attention: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    heads: Tensor = attention(q_rows, k, v, score_mod=score_mod, block_mask=blocks, scale=factor)
    heads = torch.where(live[..., None], heads, 0.0)  # [B, Hkv, M, Dv]
    heads = heads.gather(2, packed.places[..., None].expand(-1, -1, -1, v.shape[-1]))
    return token_major(heads, Nq) * gates[..., None]


def _bias_of(mask: Tensor, rows: Tensor, G: int) -> Callable[..., Tensor]:
    """The score_mod that adds the mask `[1 or B, 1 or H, 1 or Nq, 1 or Nk]` to packed rows."""
    batch, head, query, key = (int(size > 1) for size in mask.shape)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, r: Tensor, n: Tensor) -> Tensor:
        row = rows[b, h, r]
        return score + mask[b * batch, (h * G + row % G) * head, (row // G) * query, n * key]

    return add_bias


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention needs to be compiled to leave anything out; within a compiled graph it is."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    """Why the backend can't serve the call, or None."""
    if q.device.type not in ("cuda", "cpu"):
        return f"it runs on GPUs, not on {q.device.type}"
    if q.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "FlexAttention's kernels need Triton, which is not installed; it comes with PyTorch's CUDA wheels"
    if (reason := unserved_dtype(q)) is not None:
        return reason
    widths = (q.shape[-1], v.shape[-1])
    if q.device.type == "cuda" and not (min(widths) >= MIN_WIDTH and max(widths) <= MAX_WIDTH):
        return f"it has heads of width {MIN_WIDTH} to {MAX_WIDTH}, not {q.shape[-1]} and {v.shape[-1]}"
    if min(q.shape) == 0 or min(v.shape) == 0:
        return "it needs at least one query and one key"
    if (reason := unserved_options(attn_mask, dropout_p)) is not None:
        return reason
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "FlexAttention has no gradients on the CPU"
    return None
