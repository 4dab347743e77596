"""The calibration passes over one dense model, and the routers that come of them.

Joins `statistics` (what to sum up), `allocation` (heads per layer) and `fit` (closed forms); `convert` decides which to run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from moh.config import MoHConfig
from moh.conversion.allocation import allocate, layer_costs
from moh.conversion.dense import DenseModel
from moh.conversion.fit import (
    ContributionFit,
    error_left_by_refit,
    fit_contributions,
    fit_ranking,
    refit_output_projection,
    unique_part,
)
from moh.conversion.passes import (
    collect_contributions,
    collect_heads,
    collect_outputs,
    collect_several_outputs,
    layer_groups,
)
from moh.conversion.tokens import evenly_spread
from moh.routing import Router, build_router
from moh.routing.units import strongest

COST_TOKENS = 4096
"""Calibration tokens of the pass that estimates the layers' costs: with its backward half it is three times as dear."""

MIN_HEADS = 4
"""Fewest heads of a layer under the "sensitivity" allocation (or all, if the model has fewer)."""

REFIT_NUMBERS = 6
"""Numbers of heads for which it is measured how much a refit gives back; every one takes two matrices as W_O a layer."""


class Calibrator:
    """The calibration passes over one dense model.

    Attributes:
        fits: of each layer what `fit_routers` last found.
    """

    def __init__(self, dense: DenseModel, samples: Tensor, batch_size: int, progress: bool) -> None:
        """`samples` `[n, ...]` as the model reads them, `batch_size` of them in one pass."""
        self._dense = dense
        self.fits: list[ContributionFit] = []
        self._samples = samples
        self._batch_size = batch_size
        self._progress = progress

    def fit_routers(self, layers: Sequence[MoHConfig], *, refitted: bool = False) -> list[Router]:
        """One router per layer. A number of shared heads becomes the set of those that contribute most.

        Args:
            layers: each layer's heads.
            refitted: W_O is going to be refitted: of a head's contribution count what the other heads don't tell.
        """
        unique = self._unique_parts() if refitted else None
        batches = self._batches("recording what each head contributes", self._samples, self._batch_size)
        sums = collect_contributions(self._dense, batches, unique)
        self.fits = [fit_contributions(s) for s in sums]
        routers: list[Router] = []
        for layer, layer_sums, fit, attention in zip(layers, sums, self.fits, self._dense.attentions, strict=True):
            config = layer
            if isinstance(layer.shared_heads, int):
                config = dataclasses.replace(layer, shared_heads=strongest(fit.mean, layer.shared_heads, layer))
            router = build_router(config, attention.width, device=attention.device, dtype=torch.float32)
            router.take_fit(fit.weight, fit.bias, partial(fit_ranking, layer_sums))
            routers.append(router)
        return routers

    def _unique_parts(self) -> list[Tensor]:
        """Map of each layer to what is unique to its heads (`moh.conversion.fit.unique_part`), float32."""
        maps: list[Tensor] = []
        for group in layer_groups(self._dense, matrices=1):
            batches = self._batches("comparing the heads", self._samples, self._batch_size)
            sums = collect_heads(self._dense, group, batches)
            maps += [unique_part(sums[layer], self._dense.num_heads).float() for layer in group]
        return maps

    def costs(self, routers: Sequence[Router], *, refitted: bool = False) -> Tensor:
        """What each layer is estimated to lose with n heads, `[L, H + 1]` (`moh.conversion.allocation.layer_costs`).

        Args:
            refitted: W_O is going to be refitted: count what that leaves, layers differ much in it.
        """
        count = max(1, COST_TOKENS // self._dense.tokens_per_sample(self._samples))
        # Spread out: calibration data of several kinds often comes one kind after the other
        samples = evenly_spread(self._samples, count)
        batches = self._batches("estimating what each layer needs", samples, max(1, self._batch_size // 2))
        costs = layer_costs(self._dense, routers, batches)
        return costs * self._left_by_refit(routers, samples) if refitted else costs

    def _left_by_refit(self, routers: Sequence[Router], samples: Tensor) -> Tensor:
        """Part of the cost of n heads that is left when W_O has been refitted, `[L, H + 1]`; 1 for all heads."""
        h, step = self._dense.num_heads, routers[0].config.step
        first = max(min(MIN_HEADS, h - 1) // step * step, *(r.config.num_shared for r in routers), step)
        numbers = range(first, h, step)
        numbers = numbers[:: max(1, math.ceil(len(numbers) / REFIT_NUMBERS))]  # for others it is interpolated
        left = torch.ones(len(routers), h + 1, dtype=torch.float64)
        for group in layer_groups(self._dense, matrices=2 * len(numbers) + 2) if numbers else ():
            chosen = {layer: [with_heads(routers[layer], n) for n in (*numbers, h)] for layer in group}
            batches = self._batches("estimating what a refit gives back", samples, self._batch_size)
            for layer, (*kept, whole) in collect_several_outputs(self._dense, chosen, batches).items():
                written = self._dense.attentions[layer].written
                measured = [error_left_by_refit(sums, whole.gz, written) for sums in kept]
                left[layer, :-1] = torch.from_numpy(np.interp(range(h), numbers, measured))
        return left

    def reallocate(self, routers: Sequence[Router], costs: Tensor, total: int) -> list[Router]:
        """Routers with `total` heads over all layers, shared out by `costs`."""
        step = routers[0].config.step
        at_least = max(step, min(MIN_HEADS, total // len(routers)) // step * step)
        budget = allocate(costs, total, at_least=at_least, step=step)
        reallocated = []
        for router, fit, heads in zip(routers, self.fits, budget, strict=True):
            shared = strongest(fit.mean, min(router.config.num_shared, heads), router.config)
            config = dataclasses.replace(router.config, shared_heads=shared, active_heads=heads - len(shared))
            reallocated.append(router.with_config(config))
        return reallocated

    def refit_outputs(self, routers: Sequence[Router]) -> list[Tensor]:
        """New weights of each layer's output projection."""
        sums = collect_outputs(self._dense, routers, self.refit_batches())
        return [
            refit_output_projection(s, attention.output_weight)
            for s, attention in zip(sums, self._dense.attentions, strict=True)
        ]

    def refit_batches(self) -> Iterator[Tensor]:
        """All calibration data, for one pass of refitting."""
        return self._batches("refitting the output projections", self._samples, self._batch_size)

    def _batches(self, title: str, samples: Tensor, batch_size: int) -> Iterator[Tensor]:
        batches = samples.to(self._dense.device).split(batch_size)
        yield from tqdm(batches, desc=title, unit="batch", disable=not self._progress)


def with_heads(router: Router, heads: int) -> Router:
    """The same router for another number of heads, or for its shared heads where they are more."""
    active = max(0, heads - router.config.num_shared)
    return router.with_config(dataclasses.replace(router.config, active_heads=active))
