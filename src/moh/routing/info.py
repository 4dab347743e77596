"""What a router decided for one layer's input, and the load-balance loss on it, of one process or of several.

`RoutingInfo` is returned, never stored by a layer. Balance loss: the paper's "Load Balance Loss", in the published code's form;
over several processes it equals that of one batch with all their tokens, and costs an exchange of a few numbers per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moh.config import MoHConfig

_group: dist.ProcessGroup | None = None  # not a ContextVar, which torch.compile can't read in torch 2.11


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
        """Load-balance loss `h_r * sum_i f_i P_i` of this layer, a float32 scalar; k at perfect balance,
        which with a threshold is the number of routed heads that these tokens activate on average.

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
        """The sums behind the balance loss, to be added up over batches: float32 `[h_r]`, `[h_r]` and `[1]`.

        The number of tokens that activate each routed head (no gradient), the sum of its probability, and the number of
        tokens. The layer must route; `token_mask` as in `balance_loss`.
        """
        assert self.probs is not None
        active = self.active[..., list(self.config.routed_indices)].float()
        probs, count = _token_sum(self.probs, token_mask)
        return _token_sum(active, token_mask)[0], probs, count.reshape(1)


def _token_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean of `values` `[B, N, X]` over the tokens of `token_mask` `[B, N]`, `[X]`."""
    if token_mask is None:
        flat = values.flatten(0, -2)  # [B*N, X]
        return flat.sum(0) / max(len(flat), 1)  # a batch of 0 has a mean of 0
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


@contextmanager
def balance_over_processes(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Compute the balance losses in the block over the tokens of all processes of `group`, not of this one alone.

    Loss and gradient equal those of one process with all the tokens, if gradients are then averaged over the processes,
    as DDP and FSDP do. This includes models that add the balance loss to their own. With one process, or without
    `torch.distributed`, nothing changes.

    Args:
        group: the processes that read different tokens; None: all. Each of them must make the same calls.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def balance_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The processes that a balance loss is computed over: `group`, else those of the block; None for this one alone."""
    group = _group if group is None else group
    return group if group is not None and group.size() > 1 else None


def balance_losses(infos: Sequence[RoutingInfo], token_mask: Tensor | None, group: dist.ProcessGroup) -> list[Tensor]:
    """The balance losses of layers that route, each `h_r * sum_i f_i P_i` over the tokens of all processes.

    One all-reduce in the forward and one in the backward pass, whatever the number of layers.

    Args:
        infos: of layers that route, the same on every process.
        token_mask: `[B, N]`, nonzero for the tokens that count; None counts all. B and N may differ by process.
        group: the processes.
    """
    device = infos[0].gates.device
    sums = [part.to(device) for info in infos for part in info.balance_sums(token_mask)]
    total = _SumOverProcesses.apply(torch.cat(sums), group)
    losses = []
    for info in infos:  # each has 2 h_r + 1 numbers: tokens per head, probability per head, tokens
        heads = info.config.num_routed
        active, probs, count = total[: 2 * heads + 1].split([heads, heads, 1])
        count = count.clamp_min(1)
        losses.append(heads * (active / count * (probs / count)).sum())
        total = total[2 * heads + 1 :]
    return losses


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes. The loss of each depends on it, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total
