"""The linear map of a learned router, which is deliberately not an `nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Scorer(nn.Module):
    """Scores `x W^T + b`, with the tensors, names and initial weights of `nn.Linear`.

    Quantisers (bitsandbytes, torchao, GPTQ) and PEFT's "all-linear" replace every `nn.Linear` that they find. A router is
    too small for that to save anything, and errors in its scores make tokens use other heads.

    Args:
        in_features: C.
        out_features: number of scores.
        bias: whether there is a b.

    Parameters: `weight` `[out_features, C]` and `bias` `[out_features]`, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear: Any = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., out_features]`."""
        return F.linear(x, self.weight, self.bias)

    def as_linear(self) -> nn.Linear:
        """An `nn.Linear` with the same parameters, not copies: for code that initialises layers by their class."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear

    def reset_parameters(self) -> None:
        """Start again as a new `nn.Linear` does."""
        self.as_linear().reset_parameters()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
