"""Read a model's routing while it runs: `with record_routing(model) as routing: ...`.

A recording belongs to the thread or asyncio task that opened it: what others run on the same model is not in it. It works
with gradient checkpointing (`use_reentrant=False`), DDP/FSDP wrappers and `torch.compile`. With torch 2.11 a graph that
is recorded from outside is broken at each router, and refused with `fullgraph=True`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moh.routing.info import RoutingInfo, balance_group, balance_losses

if TYPE_CHECKING:
    from moh.routing.router import Router


_open: ContextVar[tuple[RoutingRecord, ...]] = ContextVar("open_recordings", default=())
_lock = threading.Lock()
_number_open = 0
_any_open = False
"""Whether any thread or task records: where none does, a compiled graph need not read `_open`, which torch 2.11 can't."""


class RoutingRecord:
    """The routing of every forward pass inside one `record_routing` block, in the order of the calls."""

    def __init__(self, names: dict[Router, str]) -> None:
        self._names = names
        self.layers: list[tuple[str, RoutingInfo]] = []
        """(name of the router in the model, its routing), one entry per layer and forward pass."""

    def __contains__(self, router: object) -> bool:
        return router in self._names

    def record(self, router: Router, info: RoutingInfo) -> None:
        """Add what a router has decided."""
        if _in_backward():
            return  # gradient checkpointing runs the forward pass again: the same routing, already here
        self.layers.append((self._names[router], info))

    def __iter__(self) -> Iterator[tuple[str, RoutingInfo]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def balance_loss(self, token_mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Mean load-balance loss (`RoutingInfo.balance_loss`) of the layers that route, a scalar.

        Args:
            token_mask: `[B, N]`, nonzero for the tokens that count (padding does not); None counts all.
            group: processes whose tokens count as well; None: those of `moh.balance_over_processes`, else this one alone.

        Raises:
            ValueError: nothing was recorded.
        """
        self._check_not_empty()
        infos = [info for _, info in self.layers if info.probs is not None]
        if not infos:
            return self.layers[0][1].gates.new_zeros((), dtype=torch.float32)
        if (processes := balance_group(group)) is not None:
            losses = balance_losses(infos, token_mask, processes)
        else:
            losses = [info.balance_loss(token_mask) for info in infos]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def load(self, token_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Layer name -> `[H]` float32, the share of tokens that activate each head (mean over forward passes)."""
        loads: dict[str, list[Tensor]] = {}
        for name, info in self.layers:
            loads.setdefault(name, []).append(info.load(token_mask).detach())
        return {name: torch.stack(values).mean(0) for name, values in loads.items()}

    def share(self) -> float:
        """Mean share of heads that were active, over tokens, heads and layers; every token of every forward pass counts alike.

        Raises:
            ValueError: nothing was recorded.
        """
        self._check_not_empty()
        active: dict[str, list[float]] = {}
        pairs: dict[str, int] = {}
        for name, info in self.layers:
            active.setdefault(name, []).append(float(info.active.sum()))
            pairs[name] = pairs.get(name, 0) + info.gates.numel()
        used = torch.tensor([sum(of_layer) for of_layer in active.values()], dtype=torch.float64)
        return float((used / torch.tensor(list(pairs.values()))).mean())

    def _check_not_empty(self) -> None:
        if not self.layers:
            raise ValueError("nothing was recorded: run the model inside the `with record_routing(model)` block")


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the routing of every MoH layer of `model` while the block runs, in this thread or asyncio task alone.

    The recorded tensors keep their autograd graph, so that `task_loss + 0.01 * routing.balance_loss()` trains the
    router. A model without MoH layers gives an empty record. To compile with `fullgraph=True` *and* use gradient
    checkpointing, set `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`: the recomputation
    then does not record again.

    Examples:
        >>> with moh.record_routing(model) as routing:  # doctest: +SKIP
        ...     loss = task_loss(model(x))
        >>> loss = loss + 0.01 * routing.balance_loss()  # doctest: +SKIP
    """
    from moh.routing.router import Router

    routers = {module: name for name, module in model.named_modules() if isinstance(module, Router)}
    record = RoutingRecord(routers)
    # The compiler can't trace a change of a ContextVar. Attributes do as well there: a traced block begins and ends inside
    # the graph, so that no other thread ever sees them changed.
    traced = torch.compiler.is_compiling()
    if traced:
        for router in routers:
            router._traced_recordings = (*router._traced_recordings, record)
    else:
        _count(1)
        _open.set((*_open.get(), record))
    try:
        yield record
    finally:
        if traced:
            for router in routers:
                router._traced_recordings = tuple(r for r in router._traced_recordings if r is not record)
        else:
            _open.set(tuple(r for r in _open.get() if r is not record))
            _count(-1)
            routers.clear()  # tasks that were started inside the block have copies of its context, and may still run


def recordings_of(router: Router) -> tuple[RoutingRecord, ...]:
    """The open recordings of this thread or task that cover the router."""
    if not _any_open:
        return router._traced_recordings
    return (*router._traced_recordings, *(record for record in _open.get() if router in record))


def _count(change: int) -> None:
    global _number_open, _any_open
    with _lock:
        _number_open += change
        _any_open = _number_open > 0


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    if torch.compiler.is_compiling():
        return False  # a compiled region is recomputed below Python
    return torch._C._current_graph_task_id() != -1
