"""`Router`, the base of all routers: order of gates, recordings and hooks, and what kernels may decide themselves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from moh.config import MoHConfig
from moh.routing.attached import Balance, attach
from moh.routing.info import RoutingInfo
from moh.routing.recording import RoutingRecord, recordings_of
from moh.routing.scorer import Scorer
from moh.routing.units import Chosen


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's own `forward` alone: no hook, also on all modules, no patched `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and not _has_any_global_hook() and "forward" not in vars(module)


class LinearMaps(NamedTuple):
    """The linear maps of x that decide, for kernels that route by themselves.

    Attributes:
        shared, routed, stage: scores of the shared heads, the routed ones and the two stages, None where there are none.
        is_hard: gates are 1 and 0; then `routed` has a row for every head, of which those of shared heads don't count.
    """

    shared: Scorer | None
    routed: Scorer | None
    stage: Scorer | None
    is_hard: bool


class Router(nn.Module):
    """Base of the routers: `forward(x, q)` with x `[B, N, C]` and q `[B, N, H, D]` -> `RoutingInfo`.

    A router uses one of the two and ignores the other. Scores and softmax are float32 whatever the inputs' dtype; gates
    are in the dtype of the tensor that was used.

    Args:
        config: the layer's heads and routing.
        dim: C, the width of the layer's input; a router without parameters needs none.
    """

    reads_queries: ClassVar[bool] = False
    """Whether q decides, not x. If x does, a layer may route before it computes the queries."""

    rounds: ClassVar[bool] = False
    """Whether the norms of q and their softmax are in q's dtype, as published, and not in float32."""

    is_hard: ClassVar[bool] = False
    """Whether every gate is exactly 1 or 0."""

    is_fitted: ClassVar[bool] = True
    """Whether a conversion fits it on calibration data (`take_fit`)."""

    needs_fit: ClassVar[bool] = False
    """Whether a converted model is useless without that fit; otherwise it may start from new weights and be trained."""

    ranks_heads: ClassVar[bool] = False
    """Whether it has `order`, and parameters for any set of shared heads (`with_config`): refits of W_O need both."""

    shared_share: ClassVar[float] = 2 / 9
    """Share of the heads that a converted model shares by default (measured by experiments/budgets_in_one_model.py)."""

    def __init__(
        self,
        config: MoHConfig,
        dim: int | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._traced_recordings: tuple[RoutingRecord, ...] = ()  # of `record_routing` inside a compiled graph
        self.heads_here = config.num_heads  # fewer where processes split the heads among them
        self.balance = Balance()  # shared with the model's other layers by `attached.attach_to_layers`
        self._set_heads(config)

    def _set_heads(self, config: MoHConfig) -> None:
        self.config = config
        # Indices are plain tuples and not buffers: buffers would appear in checkpoints or be lost on the meta device.
        # Stored as (first, count) runs: slicing needs no index tensor on the device.
        self._shared = config.shared_indices
        self._routed_runs = tuple(_runs(config.routed_indices))
        self._order = tuple(_order(config))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "config":  # the dial's turn; reading it, which decoding does often, stays a plain attribute
            self._chosen = Chosen(value.active_heads // value.step)

    @property
    def active_heads(self) -> int:
        """k; in a compiled graph a symbolic number, as the graph holds for every k."""
        return self._chosen() * self.config.step

    @property
    def heads_per_group(self) -> int | None:
        """`MoHConfig.heads_per_group`, in a compiled graph as a symbolic number."""
        config = self.config
        if config.routing_unit != "group_balanced":
            return None
        return config.num_shared // config.step + self._chosen()

    @torch.compiler.assume_constant_result
    def usual_share(self) -> float:
        """Share of the heads in use, to choose between products; a compiled graph keeps that of its first setting."""
        return self.config.share

    @classmethod
    def default_shared_heads(cls, num_heads: int, *, step: int = 1) -> int:
        """How many of a layer's heads a converted model shares by default.

        Args:
            num_heads: H.
            step: `MoHConfig.step`; the result is rounded down to a multiple of it, and at least 1 if `step` is 1.
        """
        return max(1, round(cls.shared_share * num_heads)) // step * step

    @property
    def _recorders(self) -> tuple[RoutingRecord, ...]:
        return recordings_of(self)

    def forward(self, x: Tensor | None = None, q: Tensor | None = None) -> RoutingInfo:
        source, name = (q, "q") if self.reads_queries else (x, "x")
        if source is None:
            raise ValueError(f"{name} must be given: the {self.config.router!r} router decides by it")
        info = self._route(source)
        if self.balance.coefficient and self.training and torch.is_grad_enabled() and info.probs is not None:
            info = self._with_balance(info, info.probs)
        for recording in self._recorders:
            recording.record(self, info)
        return info

    def _with_balance(self, info: RoutingInfo, probs: Tensor) -> RoutingInfo:
        """The same routing, whose gates carry the gradient of the balance loss."""
        balance = info.balance_loss()
        if not balance.requires_grad:  # nothing that decides is trained
            return info
        _, (gates,), (probs,) = attach(balance, self.balance.weight, [info.gates], [probs])
        return RoutingInfo(info.config, gates, probs)

    def is_recorded(self) -> bool:
        """Whether a recording is open that takes this router's decisions."""
        return bool(self._recorders)

    def is_observed(self) -> bool:
        """Whether anything observes `forward`: a recording, a hook, or a patched `forward`."""
        return self.is_recorded() or not is_untouched(self)

    def active_range(self) -> range:
        """Every k that this router can be set to, from 0 or 1 up to h_r; the routing unit may allow only some of them."""
        return range(self.config.num_routed + 1)

    def linear_scores(self) -> Scorer | None:
        """The linear map of x whose outputs alone decide, with gates of 1 and 0; None if routing takes more than that.

        For kernels that choose the heads themselves. It has a row for every head, shared ones included.
        """
        return None

    def linear_maps(self) -> LinearMaps | None:
        """The linear maps of x from which gates and probabilities follow; None if routing takes more than that."""
        return None

    def threshold(self) -> float | None:
        """What a routed head's score of `linear_scores` has to exceed; None if the k largest ones are chosen."""
        return None

    def take_fit(self, weight: Tensor, bias: Tensor, ranking: Callable[[Sequence[int]], Tensor]) -> None:
        """Start from the heads' contributions as the conversion has fitted them to x, `c = weight x + bias`.

        Args:
            weight: `[H, C]`.
            bias: `[H]`.
            ranking: some heads' indices -> weight `[heads, C]` of logits, without a bias, that rank them by contribution
                and differ so little that their softmax is nearly uniform.
        """

    def order(self, x: Tensor) -> Tensor:
        """Head indices `[B, N, H]`, int64, by falling score, shared heads first; only if `ranks_heads`.

        The first n are the heads that a layer of n heads uses, if n is a multiple of `config.step`; by a threshold a token
        uses the first of them too, but its own number.
        """
        raise NotImplementedError

    def with_config(self, config: MoHConfig) -> Self:
        """This router for other shared or active heads, sharing its parameters; only if `ranks_heads`."""
        other = copy.copy(self)
        other._set_heads(config)
        return other

    @torch.no_grad()
    def reorder(self, heads: Sequence[int]) -> None:
        """Follow a new order of the layer's heads, in place: head i is the former head `heads[i]`."""
        former = [list(rows) for _, rows in self._scored()]
        shared = set(self.config.shared_indices)
        places = tuple(place for place, head in enumerate(heads) if head in shared)
        self._set_heads(dataclasses.replace(self.config, shared_heads=places))
        for before, (scorer, after) in zip(former, self._scored(), strict=True):
            rows = [before.index(heads[i]) for i in after]
            for tensor in scorer.parameters():
                tensor.copy_(tensor[rows])

    def _scored(self) -> Iterator[tuple[Scorer, Sequence[int]]]:
        """The linear maps whose outputs belong to heads, and which heads those are, row by row."""
        return iter(())

    def _route(self, source: Tensor) -> RoutingInfo:
        raise NotImplementedError

    def _join(self, shared: Tensor, routed: Tensor) -> Tensor:
        """Gates of the shared `[B, N, h_s]` and routed `[B, N, h_r]` heads -> `[B, N, H]` in the heads' order."""
        return torch.cat(
            [(shared if is_shared else routed).narrow(-1, first, count) for is_shared, first, count in self._order], -1
        )

    def _of_routed(self, x: Tensor, dim: int) -> Tensor:
        """The routed heads' part of `x`, whose dimension `dim` has all heads."""
        parts = [x.narrow(dim, first, count) for first, count in self._routed_runs]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def extra_repr(self) -> str:
        c = self.config
        unit = "" if c.routing_unit == "head" else f", unit={c.routing_unit}"
        return f"heads={c.num_heads}, shared={list(self._shared)}, active={c.active_heads}, share={c.share:.2f}{unit}"


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Rising indices as runs without a gap: (first, how many)."""
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        heads = [head for _, head in run]
        yield heads[0], len(heads)


def _order(config: MoHConfig) -> Iterator[tuple[bool, int, int]]:
    """Runs that make up all heads in order: (whether shared, first among the shared or routed ones, how many)."""
    shared, seen = set(config.shared_indices), [0, 0]
    for is_shared, run in groupby(range(config.num_heads), key=shared.__contains__):
        count = len(list(run))
        yield is_shared, seen[is_shared], count
        seen[is_shared] += count
