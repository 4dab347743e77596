"""Whether a linear layer is what its weight says: what may be computed from the weight alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_plain(linear: nn.Module, x: Tensor) -> bool:
    """Whether `linear` is PyTorch's own, of x's dtype and device: no adapter, hook, quantisation or offloading."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    weight = linear.weight
    plain = type(weight) in (nn.Parameter, Tensor) or torch.compiler.is_compiling()
    return plain and weight.dtype == x.dtype and weight.device == x.device
