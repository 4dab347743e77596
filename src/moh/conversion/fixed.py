"""A layer whose heads are chosen once, for every token: which, with which W_O, or a linear map where no head is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moh.config import FIXED, MoHConfig
from moh.conversion.allocation import Change
from moh.conversion.dense import DenseAttention, OutputWeight
from moh.conversion.fit import LinearMap, refit_fixed


@dataclass
class FixedFit:
    """What the calibration shows of one layer.

    Attributes:
        attention: the dense layer.
        heads: all heads, those that can be left out first at the end (`moh.conversion.fit.order_of_removal`).
        left: `[H + 1]`, fraction of the cost of n heads that remains after the refit; 1 without a refit.
        zz: sum z z' over tokens, z all heads, concatenated, `[H*D, H*D]`, float64.
        linear: what replaces the attention if no head is left; None for nothing.
    """

    attention: DenseAttention
    heads: list[int]
    left: Tensor
    zz: Tensor
    linear: LinearMap | None

    def order(self, x: Tensor) -> Tensor:
        """The heads for every token of x `[..., C]`: `[..., H]`."""
        return torch.tensor(self.heads, device=x.device).expand(*x.shape[:-1], -1)

    def config(self, count: int, like: MoHConfig) -> MoHConfig:
        """The layer with its `count` most needed heads, in `like`'s routing unit."""
        heads = sorted(self.heads[:count])
        return MoHConfig(like.num_heads, heads, 0, FIXED, routing_unit=like.routing_unit, kv_heads=like.kv_heads)

    def weight(self, count: int, refitted: bool) -> OutputWeight:
        """W_O of the `count` most needed heads, or the linear map that replaces them."""
        weight, heads, h = self.attention.output_weight.detach(), sorted(self.heads[:count]), len(self.heads)
        if not heads:
            if self.linear is None:
                return OutputWeight(None, None)
            return OutputWeight(self.linear.weight.to(weight), self.linear.bias.to(weight))
        if count == h or not refitted:
            return OutputWeight(weight.unflatten(1, (h, -1))[:, heads].flatten(1).contiguous(), None)
        return OutputWeight(refit_fixed(self.zz, weight, heads, h), None)

    def change(self, count: int, refitted: bool) -> Change:
        """What the layer adds with its `count` most needed heads, from its input and the dense heads."""
        kept, h = self.weight(count, refitted), len(self.heads)
        weight, bias, heads = kept.weight, kept.bias, sorted(self.heads[:count])

        def change(x: Tensor, z: Tensor) -> Tensor:
            if weight is None:
                return torch.zeros_like(x)
            if not heads:
                return nn.functional.linear(x, weight, bias)
            return nn.functional.linear(z.unflatten(-1, (h, -1))[..., heads, :].flatten(-2), weight)

        return change
