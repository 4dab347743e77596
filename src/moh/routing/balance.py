"""The load-balance loss of layers whose tokens are spread over several processes, as of one batch that holds them all.

Used by `RoutingInfo.balance_loss` and `RoutingRecord.balance_loss`, which derive it for the tokens of one process.
Everything that goes between processes is a few numbers per head. Not for choosing the process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from moh.routing.info import RoutingInfo

_group: ContextVar[dist.ProcessGroup | None] = ContextVar("balance_group", default=None)


@contextmanager
def balance_over_processes(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Compute the balance losses in the block over the tokens of all processes of `group`, not of this one alone.

    Loss and gradient are those of one process with all the tokens, where the gradients are then averaged over the
    processes, as DDP and FSDP do. It also holds inside models that add the balance loss to their own. With one process,
    or without `torch.distributed`, nothing changes.

    Args:
        group: the processes that read different tokens; None: all. Each of them must make the same calls.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def balance_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The processes that a balance loss is computed over: `group`, else those of the block; None for this one alone."""
    group = _group.get() if group is None else group
    return group if group is not None and group.size() > 1 else None


def balance_losses(infos: Sequence[RoutingInfo], token_mask: Tensor | None, group: dist.ProcessGroup) -> list[Tensor]:
    """The balance losses of layers that route, each `h_r * sum_i f_i P_i` over the tokens of all processes.

    The processes meet once in the forward pass and once in the backward pass, however many layers there are.

    Args:
        infos: of layers that route, the same on every process.
        token_mask: `[B, N]`, nonzero for the tokens that count; None counts all. B and N may differ by process.
        group: the processes.
    """
    device = infos[0].gates.device
    sums = [part.to(device) for info in infos for part in info.balance_sums(token_mask)]
    total = _SumOverProcesses.apply(torch.cat(sums), group)
    losses = []
    for info in infos:
        heads = info.config.num_routed
        active, probs, count = total[: 2 * heads + 1].split([heads, heads, 1])
        count = count.clamp_min(1)
        losses.append(heads * (active / count * (probs / count)).sum())
        total = total[2 * heads + 1 :]
    return losses


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes. Each has a loss that depends on it, so that the gradients are summed as well."""

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
