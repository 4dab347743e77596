"""What a router decided for one layer's input, and the load-balance loss on it.

`RoutingInfo` is returned, never stored by a layer. Balance loss: the paper's "Load Balance Loss", in the published code's form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moh.config import MoHConfig
from moh.routing.balance import balance_group, balance_losses


@dataclass(frozen=True)
class RoutingInfo:
    """The routing of B sequences of N tokens over H heads, of which h_r are routed.

    Attributes:
        config: the layer's heads and routing.
        gates: `[B, N, H]`, the weight of every head's output; exactly 0 where the head is inactive.
        probs: `[B, N, h_r]` float32, softmax over the routed heads' scores; None if the layer routes nothing.
    """

    config: MoHConfig
    gates: Tensor
    probs: Tensor | None

    @property
    def active(self) -> Tensor:
        """`[B, N, H]` bool: which heads each token uses."""
        return self.gates != 0

    def load(self, token_mask: Tensor | None = None) -> Tensor:
        """`[H]` float32: the share of tokens that activate each head.

        Args:
            token_mask: `[B, N]`, nonzero for the tokens that count (padding does not); None counts all.
        """
        return _token_mean(self.active.float(), token_mask)

    def balance_loss(self, token_mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Load-balance loss `h_r * sum_i f_i P_i` of this layer, a float32 scalar; k at perfect balance.

        f_i is the share of tokens that activate routed head i (no gradient), P_i the mean of its probability.
        It is 0 for a layer that routes nothing.

        Args:
            token_mask: `[B, N]`, nonzero for the tokens that count (padding does not); None counts all.
            group: processes whose tokens count as well; None: those of `moh.balance_over_processes`, else this one alone.
        """
        if self.probs is None:
            return self.gates.new_zeros((), dtype=torch.float32)
        if (processes := balance_group(group)) is not None:
            return balance_losses([self], token_mask, processes)[0]
        routed = list(self.config.routed_indices)
        f = self.load(token_mask)[routed].detach()  # [h_r]
        p = _token_mean(self.probs, token_mask)  # [h_r]
        return self.config.num_routed * (f * p).sum()

    def balance_sums(self, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the balance loss is made of, for adding up over batches: float32 `[h_r]`, `[h_r]` and `[1]`.

        The number of tokens that activate each routed head (no gradient), the sum of its probability, and the number of
        tokens; of a layer that routes. `token_mask` as in `balance_loss`.
        """
        assert self.probs is not None
        active = self.active[..., list(self.config.routed_indices)].float()
        probs, count = _token_sum(self.probs, token_mask)
        return _token_sum(active, token_mask)[0], probs, count.reshape(1)


def _token_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean of `values` `[B, N, X]` over the tokens of `token_mask` `[B, N]`, `[X]`."""
    if token_mask is None:
        return values.flatten(0, -2).mean(0)
    total, count = _token_sum(values, token_mask)
    return total / count.clamp_min(1)


def _token_sum(values: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of `values` `[B, N, X]` over the tokens of `token_mask` `[B, N]`, `[X]`, and their number, a scalar."""
    flat = values.flatten(0, -2)  # [B*N, X]
    if token_mask is None:
        return flat.sum(0), flat.new_tensor(len(flat))
    if token_mask.shape != values.shape[:-1]:
        raise ValueError(f"token_mask must have shape {tuple(values.shape[:-1])}, got {tuple(token_mask.shape)}")
    weight = (token_mask != 0).to(flat.dtype).reshape(-1, 1)  # [B*N, 1]
    # where, not a product: a padding token may hold NaN
    return torch.where(weight > 0, flat, 0.0).sum(0), weight.sum()
