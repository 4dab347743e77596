"""`Call`: the arguments of one call of `moh_attention`; their checks, the combining of masks, and what all our kernels refuse.

The twin of the C++ kernels' `Problem` (`cpu/csrc/kernels/problem.h`).

All backends read masks by one rule, that of the plain formula of `scaled_dot_product_attention` in float32:

- False and -inf hide a key, whatever else the mask holds for it if it is hidden by causality too. A query that may see no
  key gives 0, with gradients of 0.
- Every finite number is added to the score. Next to `torch.finfo(dtype).min` a score of usual size is lost to rounding, so a
  query whose keys all have it gives the average of the keys that causality lets it see.
- NaN and +inf make that query's output NaN, in the heads that read the mask there, and with it the gradients of its query and
  its gate, and of the keys and values of that key/value head; inactive heads and everything else keep their numbers.
- A mask in another floating-point dtype than q's is refused. In autocast it is converted, as in PyTorch, and a number beyond
  the new range becomes infinite: float32's lowest number then hides a key of a bfloat16 call.

PyTorch's own kernels keep a log-sum-exp, which has no room for the number of keys next to the lowest numbers: `flex`, and `sdpa`
and `grouped` on GPUs and in compiled graphs, give a row of n keys that all have them n times the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that our compiled kernels support."""


class Call(NamedTuple):
    """What a backend gets: the arguments of `moh_attention`, which defines them, with autocast's dtypes.

    A backend's `attend` may rely on `check` and on a mask of 4 dimensions, `[1 or B, 1 or H, 1 or Nq, 1 or Nk]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    heads_per_group: int | None = None


def check(call: Call) -> None:
    """Check the arguments once for all backends, by shapes and dtypes alone: no number is read from a device.

    Raises:
        ValueError: a shape, dtype or number is not as `moh_attention` defines it; the message names the argument, its
            value and what is allowed.
    """
    q, k, v, gates = call.q, call.k, call.v, call.gates
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
    if call.attn_mask is not None:
        _check_mask(call.attn_mask, q, Nk)
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {call.dropout_p}")
    if call.heads_per_group is not None and not 1 <= call.heads_per_group <= H // Hkv:
        raise ValueError(f"heads_per_group must be between 1 and {H // Hkv}, got {call.heads_per_group}")


def _check_mask(attn_mask: Tensor, q: Tensor, Nk: int) -> None:
    if attn_mask.dtype not in (torch.bool, q.dtype):
        raise ValueError(
            f"attn_mask must be bool or of q's dtype {q.dtype}, got {attn_mask.dtype}: make it bool (True = may be seen), or "
            "convert it with .to(q.dtype), where numbers beyond that range become infinite and so hide keys"
        )
    full = (*q.shape[:3], Nk)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(s not in (1, f) for s, f in zip(shape, full, strict=True)):
        raise ValueError(
            f"attn_mask must be broadcastable to [B, H, Nq, Nk] = {full}, got shape {tuple(attn_mask.shape)}"
        )


def with_four_dims(attn_mask: Tensor) -> Tensor:
    """A mask that is broadcastable to `[B, H, Nq, Nk]` as `[1 or B, 1 or H, 1 or Nq, 1 or Nk]`."""
    return attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask.dim() < 4 else attn_mask


def hide(attn_mask: Tensor | None, seen: Tensor) -> Tensor:
    """`attn_mask` that also hides whatever the bool mask `seen` does not allow; the two are broadcast."""
    if attn_mask is None:
        return seen
    return attn_mask & seen if attn_mask.dtype == torch.bool else torch.where(seen, attn_mask, -torch.inf)


def seen_by(tokens: Tensor, Nk: int) -> Tensor:
    """Which of `Nk` keys tokens `[..., rows, 1]` see in causal attention, those up to their own: bool `[..., rows, Nk]`."""
    return torch.arange(Nk, device=tokens.device) <= tokens


def unsupported_dtype(x: Tensor) -> str | None:
    """Why our compiled kernels can't compute tensors of x's dtype, or None."""
    if x.dtype in DTYPES:
        return None
    return f"it computes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"


def unsupported_options(attn_mask: Tensor | None, dropout_p: float) -> str | None:
    """Why our compiled kernels can't handle a transform, dropout or a mask that needs a gradient, or None."""
    if transforms_are_active():
        return "it has no rules for torch.func's transforms"
    if dropout_p > 0:
        return "it has no dropout of attention weights"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for the mask"
    return None


def transforms_are_active() -> bool:
    """Whether the call is inside `torch.func.grad`, `vmap` or the like."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def vmap_is_active() -> bool:
    """Whether the call is inside `torch.func.vmap`, alone or among other transforms."""
    if not transforms_are_active():
        return False
    return any(level.key() == TransformType.Vmap for level in retrieve_all_functorch_interpreters())


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; it has no meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
