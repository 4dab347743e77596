"""What no compiled kernel of ours serves, whatever it runs on: the reasons that the backends give.

Each backend adds its own limits, such as its device and its widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unserved_dtype(x: Tensor) -> str | None:
    """Why tensors of x's dtype can't be served, or None."""
    if x.dtype in DTYPES:
        return None
    return f"it computes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"


def unserved_options(attn_mask: Tensor | None, dropout_p: float) -> str | None:
    """Why a call inside a transform, with dropout or with a mask that wants a gradient can't be served, or None."""
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
