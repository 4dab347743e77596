"""The arguments of `moh_attention`, checked once for all backends; reads shapes and dtypes alone, never what tensors hold.

Not for what a single backend can't serve (`unsupported` of each).
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_limits(H: int, Hkv: int, *, heads_per_group: int | None, groups_per_token: int | None) -> None:
    """What a token promises to use is some of what there is.

    Raises:
        ValueError: it is not.
    """
    for name, limit, most in (
        ("heads_per_group", heads_per_group, H // Hkv),
        ("groups_per_token", groups_per_token, Hkv),
    ):
        if limit is not None and not 1 <= limit <= most:
            raise ValueError(f"{name} must be between 1 and {most}, got {limit}")


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    sliding_window: int | None,
) -> None:
    """Shapes, dtypes and numbers are those of `moh_attention`.

    Raises:
        ValueError: one is not; the message names it, what came and what is allowed.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, heads, N, D], got shape {tuple(tensor.shape)}")
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"q must have a multiple of k's {Hkv} heads, got {H}")
    if k.shape != (B, Hkv, Nk, D):
        raise ValueError(f"k must have shape [B = {B}, Hkv, Nk, D = {D}] to match q, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have shape [{B}, {Hkv}, {Nk}, D] to match k, got {tuple(v.shape)}")
    if gates.shape != (B, Nq, H):
        raise ValueError(f"gates must have shape [B, Nq, H] = {(B, Nq, H)}, got {tuple(gates.shape)}")
    if not q.dtype == k.dtype == v.dtype == gates.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k, v and gates must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}, {gates.dtype}"
        )
    if attn_mask is not None:
        _check_mask(attn_mask, q, Nk)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if sliding_window is not None and (sliding_window < 1 or not is_causal):
        raise ValueError(
            f"sliding_window must be at least 1 and needs is_causal=True, got {sliding_window}, {is_causal}"
        )


def _check_mask(attn_mask: Tensor, q: Tensor, Nk: int) -> None:
    if attn_mask.dtype not in (torch.bool, q.dtype):
        raise ValueError(f"attn_mask must be bool or of q's dtype {q.dtype}, got {attn_mask.dtype}")
    full = (*q.shape[:3], Nk)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(s not in (1, f) for s, f in zip(shape, full, strict=True)):
        raise ValueError(
            f"attn_mask must be broadcastable to [B, H, Nq, Nk] = {full}, got shape {tuple(attn_mask.shape)}"
        )
