"""The routers: a layer's input or queries -> gates; one class per rule, with what callers need to know as attributes.

Two-stage: the paper's "Two-Stage Routing", with the published scaling. Query norm: its continue-tuning. Linear: ours.
A new one needs a class here, an entry in `_CLASSES` and its name in `moh.config.ROUTERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from moh.config import FIXED, ROUTERS, MoHConfig
from moh.routing.info import RoutingInfo
from moh.routing.router import LinearMaps, Router
from moh.routing.scorer import Scorer
from moh.routing.units import choose, is_for_all_settings, order


class TwoStageRouter(Router):
    """Learned router for models trained from scratch (the paper's "Two-Stage Routing").

    `[a_1, a_2] = softmax(W_h x)`, shared gates from `softmax(W_s x)`, routed gates from the top k of `softmax(W_r x)`.
    As in the published models, shared gates are `2 a_1 h_s softmax(W_s x)` and routed gates `2 a_2 k p_i / sum_active p_j`:
    a uniform router weighs every active head 1. The paper's text omits these factors.

    Parameters (bias-free): `shared.weight` W_s `[h_s, C]` (if h_s > 1), `routed.weight` W_r `[h_r, C]` (if k > 0),
    `stage.weight` W_h `[2, C]` (if there are shared and active routed heads).
    """

    has_stage: ClassVar[bool] = True
    """Whether there is a W_h."""

    def __init__(
        self, config: MoHConfig, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, dim)

        def scorer(out_features: int, needed: bool) -> Scorer | None:
            return Scorer(dim, out_features, bias=False, device=device, dtype=dtype) if needed else None

        self.shared = scorer(config.num_shared, config.num_shared > 1)
        self.routed = scorer(config.num_routed, config.active_heads > 0)
        both = config.num_shared > 0 and config.active_heads > 0
        self.stage = scorer(2, both and self.has_stage)

    def linear_maps(self) -> LinearMaps:
        return LinearMaps(self.shared, self.routed, self.stage, is_hard=False)

    def active_range(self) -> range:
        # Without W_r there are no scores; with it, a k of 0 would be saved as a router without one
        return range(1) if self.routed is None else range(1, self.config.num_routed + 1)

    @torch.no_grad()
    def take_fit(self, weight: Tensor, bias: Tensor, ranking: Callable[[Sequence[int]], Tensor]) -> None:
        for undecided in (self.shared, self.stage):  # uniform: every shared head has weight 1, a_1 = a_2
            if undecided is not None:
                undecided.weight.zero_()
        if self.routed is not None:
            self.routed.weight.copy_(ranking(self.config.routed_indices))

    def _scored(self) -> Iterator[tuple[Scorer, Sequence[int]]]:
        if self.shared is not None:
            yield self.shared, self.config.shared_indices
        if self.routed is not None:
            yield self.routed, self.config.routed_indices

    def _route(self, source: Tensor) -> RoutingInfo:
        config = self.config
        # a_1, a_2: [B, N, 1]. The factor 2 makes both 1 when the stage is undecided.
        a_shared: Tensor | float = 1.0
        a_routed: Tensor | float = 1.0
        if self.stage is not None:
            stage = self.stage(source).float().softmax(-1) * 2.0
            a_shared, a_routed = stage[..., :1], stage[..., 1:]

        if self.shared is not None:
            shared = self.shared(source).float().softmax(-1)  # [B, N, h_s]
        else:
            shared = source.new_ones((*source.shape[:-1], config.num_shared), dtype=torch.float32)
        shared = a_shared * shared * config.num_shared  # a uniform softmax is 1 / h_s: times h_s, 1

        if self.routed is None:
            routed = source.new_zeros((*source.shape[:-1], config.num_routed), dtype=torch.float32)
            return RoutingInfo(config, self._join(shared, routed).to(source.dtype), None)
        probs = self.routed(source).float().softmax(-1)  # [B, N, h_r]
        chosen = torch.where(choose(probs, config, self._chosen()), probs, 0.0)
        total = chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(source.dtype).eps)
        chosen = self.active_heads * chosen / total  # they sum to k, so active heads average 1
        return RoutingInfo(config, self._join(shared, a_routed * chosen).to(source.dtype), probs)


class SingleStageRouter(TwoStageRouter):
    """The paper's ablation of the two-stage router: without W_h, `2 a_1 = 2 a_2 = 1`."""

    has_stage = False


class _HardRouter(Router):
    """Gates of exactly 1 and 0, with a straight-through gradient to the routed heads' `surrogate`."""

    is_hard = True

    def _routes(self) -> bool:
        """Whether tokens choose any head. A compiled graph sees that only if it is recorded: its balance loss needs it."""
        if is_for_all_settings() and not self._recorders:
            return self.config.num_routed > 0
        return bool(self._chosen() > 0)

    def _active(self, scores: Tensor) -> Tensor:
        """Which routed heads are active, by their scores: `[B, N, h_r]` bool."""
        return choose(scores, self.config, self._chosen())

    def _hard_gates(self, scores: Tensor, surrogate: Tensor, dtype: torch.dtype) -> Tensor:
        """`scores` decide the top k and `surrogate` gets the gates' gradient; both `[B, N, h_r]` -> `[B, N, H]`."""
        routed = self._active(scores).to(surrogate.dtype)
        if surrogate.requires_grad:
            routed = routed + (surrogate - surrogate.detach())  # adds 0: the value stays exactly 1 or 0
        shared = routed.new_ones((*routed.shape[:-1], self.config.num_shared))
        return self._join(shared, routed).to(dtype)


class QueryNormRouter(_HardRouter):
    """Parameter-free router for pretrained models (the paper's continue-tuning): a head's score is its query's L2 norm.

    Per token the h_r norms, divided by their unbiased standard deviation, go through a softmax to give p; the top k
    are active with gate 1. In training the gate's gradient goes to p (straight-through estimator).
    """

    reads_queries = True
    is_fitted = False
    shared_share = 1 / 2  # without a fit no head is known to be better; as in the paper's conversion

    def _route(self, source: Tensor) -> RoutingInfo:
        config = self.config
        if source.dim() != 4 or source.shape[-2] != config.num_heads:
            raise ValueError(f"q must have shape [B, N, num_heads = {config.num_heads}, D], got {tuple(source.shape)}")
        if not self._routes():
            gates = self._hard_gates_without_routing(source)
            return RoutingInfo(config, gates, None)
        queries = self._of_routed(source, -2)
        norms = (queries if self.rounds else queries.float()).norm(dim=-1)  # [B, N, h_r]
        if config.num_routed > 1:  # a single head has no spread, and its probability is 1 anyway
            norms = norms / norms.std(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
        probs = norms.softmax(-1)
        gates = self._hard_gates(probs if self.rounds else norms, probs.float(), source.dtype)
        return RoutingInfo(config, gates, probs.float())

    def _hard_gates_without_routing(self, q: Tensor) -> Tensor:
        tokens = q.shape[:-2]
        return self._join(q.new_ones((*tokens, self.config.num_shared)), q.new_zeros((*tokens, self.config.num_routed)))


class RoundedQueryNormRouter(QueryNormRouter):
    """The query-norm router as MoH-LLaMA3-8B's published code computes it: every step is rounded to the queries' dtype.

    p ranks the heads, not the norms. In bfloat16 p often ties, and then heads other than those with the longest queries are
    chosen; in float32 that is rare. Among tied heads `torch.topk` chooses in eager execution, and the first one in a graph of
    `torch.compile`, which holds for every k: there the two may differ.
    """

    rounds = True


class LinearRouter(_HardRouter):
    """Contribution router, for conversion: predicts each head's contribution to the residual stream from x.

    `c = W_r x + b` estimates `c_i = ||H_i(x) W_O^i||_2`; a token activates the k routed heads with the largest c_i.
    Gates are 1 and 0; in training the gate's gradient goes to c_i (straight-through estimator) and on to W_r and b, not
    to x. The fit is in `moh.conversion`.

    Parameters: `contribution.weight` W_r `[H, C]` and `contribution.bias` b `[H]`; they cover all heads, shared ones
    too, so that another set of shared heads needs no new fit.
    """

    needs_fit = True
    ranks_heads = True

    def __init__(
        self, config: MoHConfig, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, dim)
        self.contribution = Scorer(dim, config.num_heads, device=device, dtype=dtype)

    def _route(self, source: Tensor) -> RoutingInfo:
        # The fit has large weights along directions that x hardly uses: back through them, the gates' gradient would
        # swamp that of the attention itself (thousands of times, measured on SmolLM2). So it stops at the router.
        logits = self._of_routed(self.contribution(source.detach()).float(), -1)  # [B, N, h_r]
        probs = logits.softmax(-1) if self._routes() else None
        return RoutingInfo(self.config, self._hard_gates(logits, logits, source.dtype), probs)

    def order(self, x: Tensor) -> Tensor:
        logits = self.contribution(x).float()
        logits[..., list(self._shared)] = torch.inf
        return order(logits, self.config)

    def linear_scores(self) -> Scorer:
        return self.contribution

    def linear_maps(self) -> LinearMaps | None:
        return LinearMaps(None, self.contribution, None, is_hard=True)

    @torch.no_grad()
    def take_fit(self, weight: Tensor, bias: Tensor, ranking: Callable[[Sequence[int]], Tensor]) -> None:
        assert self.contribution.bias is not None
        self.contribution.weight.copy_(weight)
        self.contribution.bias.copy_(bias)

    def _scored(self) -> Iterator[tuple[Scorer, Sequence[int]]]:
        yield self.contribution, range(self.config.num_heads)


class ThresholdRouter(LinearRouter):
    """Contribution router of which a token uses as many heads as it needs: those whose predicted c_i is above a threshold.

    One threshold per layer and number of heads, such that a token of the calibration data used k routed heads on average;
    on other data the average may differ. Gates and gradient are those of `LinearRouter`; the thresholds have none.

    Parameters: those of `LinearRouter`. Thresholds are in the configuration (`MoHConfig.thresholds`) and not in checkpoints, as
    they would be rounded there with the model, sharded or averaged; they hold for its shared heads alone.

    Raises:
        ValueError: in use, no thresholds have been fitted.
    """

    thresholds: Tensor
    """`[h_r + 1]` float32, for compiled graphs, which hold for every layer and k."""

    def __init__(
        self, config: MoHConfig, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, dim, device=device, dtype=dtype)
        self.register_buffer("thresholds", None, persistent=False)
        self.reset_thresholds()

    def _set_heads(self, config: MoHConfig) -> None:
        super()._set_heads(config)
        if "thresholds" in self._buffers:
            self.reset_thresholds()

    def reset_thresholds(self) -> None:
        """Take the thresholds from the configuration again, where memory was allocated without values."""
        values = self.config.thresholds or [0.0] * (self.config.num_routed + 1)
        made = torch.tensor(values, dtype=torch.float32, device=self.contribution.weight.device)
        self._buffers = {**self._buffers, "thresholds": made}  # `with_config` copies share the former dict

    @torch.no_grad()
    def fit_thresholds(self, scores: Tensor) -> None:
        """Set the thresholds so that tokens with these scores `[T, H]` use each number of heads on average."""
        falling = self._of_routed(scores.float(), -1).flatten().sort(descending=True).values
        routed, last = self.config.num_routed, len(falling) - 1
        if routed == 0:
            return self._set_heads(dataclasses.replace(self.config, thresholds=[0.0]))  # all heads are shared
        places = [k * len(falling) // routed for k in range(routed + 1)]  # of the first score that is not used
        means = [float(falling[max(place - 1, 0) : min(place, last) + 1].mean()) for place in places]
        self._set_heads(dataclasses.replace(self.config, thresholds=means))

    def _active(self, scores: Tensor) -> Tensor:
        if self.config.thresholds is None:
            raise ValueError(
                "thresholds must be fitted for router='threshold', as moh.convert does; a layer to be trained has 'two_stage'"
            )
        routed, chosen = self.config.num_routed, self._chosen()
        if not is_for_all_settings():
            if chosen in (0, routed):  # none or all, whatever the scores are
                return torch.full_like(scores, chosen > 0, dtype=torch.bool)
            return ~(scores <= self.config.thresholds[chosen])  # NaN counts as above, so that it is seen in the output
        none = torch.arange(1, device=scores.device)  # no branch may depend on k
        return ~(scores <= self.thresholds[chosen]) & (none < chosen) | (none + routed <= chosen)

    def linear_maps(self) -> LinearMaps | None:
        return None if self.config.thresholds is None else super().linear_maps()  # the definition has the error

    def threshold(self) -> float | None:
        return None if self.config.thresholds is None else self.config.thresholds[self.config.active_heads]


class FixedRouter(Router):
    """No routing: gates of 1 for the shared heads and 0 for the others, whatever the input is.

    A model of transformers has no projections for the others (`moh.models.transformers.fixed`).
    """

    is_hard = True
    needs_fit = True  # which heads are kept is found on calibration data

    def _route(self, source: Tensor) -> RoutingInfo:
        ones = source.new_ones((*source.shape[:-1], self.config.num_heads))
        shared, others = ones.split((self.config.num_shared, self.config.num_heads - self.config.num_shared), dim=-1)
        return RoutingInfo(self.config, self._join(shared, torch.zeros_like(others)), None)


_CLASSES: dict[str, type[Router]] = {
    "two_stage": TwoStageRouter,
    "single_stage": SingleStageRouter,
    "query_norm": QueryNormRouter,
    "query_norm_rounded": RoundedQueryNormRouter,
    "linear": LinearRouter,
    "threshold": ThresholdRouter,
    FIXED: FixedRouter,
}


def router_class(name: str) -> type[Router]:
    """The router class with this name, one of `moh.config.ROUTERS` or "fixed".

    Raises:
        ValueError: no router has this name.
    """
    if name not in _CLASSES:
        raise ValueError(f"router must be one of {', '.join(map(repr, (*ROUTERS, FIXED)))}, got {name!r}")
    return _CLASSES[name]


def is_as_named(router: Router) -> bool:
    """Whether it is of the class that its name stands for: kernels must not route for another, which may decide otherwise."""
    return type(router) is _CLASSES.get(router.config.router)


def build_router(
    config: MoHConfig, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Router:
    """The router that `config.router` names, for a layer whose input has width `dim`."""
    return router_class(config.router)(config, dim, device=device, dtype=dtype)
