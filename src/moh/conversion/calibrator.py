"""Calibration of one dense model: fitted routers, the heads of each layer, and W_O for them.

Joins `passes` (what to sum up) and `fit` (closed forms); `convert` decides which to run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from moh.config import MoHConfig
from moh.conversion.copying import COPY_BLOCKS, COPY_LENGTH, copying_heads, least_loss, with_copies
from moh.conversion.dense import DenseModel
from moh.conversion.fit import (
    ContributionFit,
    error_left_by_refit,
    fit_contributions,
    fit_ranking,
    low_rank_change,
    refit_output_projection,
    unique_part,
)
from moh.conversion.passes import (
    collect_contributions,
    collect_heads,
    collect_several_outputs,
    layer_costs,
    layer_groups,
    losses_at,
)
from moh.conversion.recording import Playback, Recording, run
from moh.data.text.blocks import evenly_spread
from moh.models.dial import allowed_counts, spend
from moh.models.output_changes import add_output_changes, output_projection, routed_attentions, used_heads
from moh.routing import Router, ThresholdRouter, build_router
from moh.routing.units import strongest

COST_TOKENS = 4096
"""Calibration tokens of the pass that estimates the layers' costs: its backward half makes it three times as slow."""

SCORED_TOKENS = 65_536
"""Calibration tokens that thresholds are found on: all scores of a layer are sorted."""

LEAST_HEADS = 4
"""Every layer keeps as many heads, or a third of its heads if that is less, because estimates are far too low below."""

TOO_FEW = 1e3
"""Penalty per squared head below `least_heads`, in nats per token: estimates are far too low there, and the penalty spreads
very small shares over all layers."""

REFIT_NUMBERS = 6
"""The gain of a refit is measured for this many numbers of heads; each takes two matrices of W_O's size per layer."""

RANK = 64
"""Largest rank of a change of W_O (measured by experiments/budgets_in_one_model.py)."""


class Calibrator:
    """The calibration passes over one dense model.

    Attributes:
        dense: the dense model.
        fits: what `fit_routers` last found for each layer.
    """

    def __init__(self, dense: DenseModel, samples: Tensor | Sequence[Tensor], batch_size: int, progress: bool) -> None:
        """`samples` `[n, ...]` as the model reads them, or such of several lengths, the shortest first.

        A pass takes `batch_size` of the shortest at once, and about as many tokens of longer ones.
        """
        self.dense = dense
        self.fits: list[ContributionFit] = []
        self._scores: dict[int, Tensor] = {}  # [T, H] of layers whose routers have thresholds
        self._copy_losses: dict[tuple[tuple[int, ...], ...], Tensor] = {}  # by the layers' shared heads
        self._groups = [samples] if isinstance(samples, Tensor) else list(samples)
        self.batch_size = batch_size
        shortest = self._groups[0].shape[1]
        batches = [
            batch
            for group in self._groups
            for batch in group.to(dense.device).split(max(1, batch_size * shortest // group.shape[1]))
        ]
        self._places = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch))]
        self._recording = Recording(batches)
        self._progress = progress

    def fit_routers(self, layers: Sequence[MoHConfig], *, refitted: bool = False) -> list[Router]:
        """One router per layer. A number of shared heads becomes the set of those that contribute most.

        Args:
            layers: each layer's heads.
            refitted: W_O will be refitted: count only the part of a contribution that other heads can't replace.
        """
        unique = self._unique_parts() if refitted else None
        batches = self.playback("recording what each head contributes")
        sums = collect_contributions(self.dense, batches, unique)
        self.fits = [fit_contributions(s) for s in sums]
        routers: list[Router] = []
        for layer, layer_sums, fit, attention in zip(layers, sums, self.fits, self.dense.attentions, strict=True):
            config = layer
            if isinstance(layer.shared_heads, int):
                config = dataclasses.replace(layer, shared_heads=strongest(fit.mean, layer.shared_heads, layer))
            router = build_router(config, attention.width, device=attention.device, dtype=torch.float32)
            router.take_fit(fit.weight, fit.bias, partial(fit_ranking, layer_sums))
            routers.append(router)
        self._fit_thresholds(routers)
        return routers

    @torch.no_grad()
    def _fit_thresholds(self, routers: Sequence[Router]) -> None:
        """Set the thresholds of those routers that have some, by their scores on the calibration data."""
        with_thresholds = {i: router for i, router in enumerate(routers) if isinstance(router, ThresholdRouter)}
        if not with_thresholds:
            return
        scores: dict[int, list[Tensor]] = {index: [] for index in with_thresholds}

        def add(index: int, x: Tensor, z: Tensor) -> None:
            scores[index].append(with_thresholds[index].contribution(x.float()).cpu())

        samples = self._chosen(SCORED_TOKENS)
        run(self.dense, self.playback("finding thresholds", samples), add, scores.keys())
        self._scores = {index: torch.cat(of_layer) for index, of_layer in scores.items()}
        for index, router in with_thresholds.items():
            router.fit_thresholds(self._scores[index])

    def _unique_parts(self) -> list[Tensor]:
        """Map of each layer to what is unique to its heads (`moh.conversion.fit.unique_part`), float32."""
        maps: list[Tensor] = []
        for group in layer_groups(self.dense, matrices=1):
            batches = self.playback("comparing the heads")
            sums = collect_heads(self.dense, group, batches)
            maps += [unique_part(sums[layer].zz, self.dense.num_heads).float() for layer in group]
        return maps

    def costs(self, routers: Sequence[Router], *, refitted: bool = False) -> Tensor:
        """What each layer is estimated to lose with n heads, `[L, H + 1]` (`moh.conversion.passes.layer_costs`).

        Args:
            refitted: W_O will be refitted: count only the cost that remains, which differs much between layers.
        """
        costs = layer_costs(self.dense, routers, self.cost_batches())
        if not refitted:
            return costs
        h, step = self.dense.num_heads, routers[0].config.step
        first = max(min(least_heads(h), h - 1) // step * step, *(r.config.num_shared for r in routers), step)
        numbers = range(first, h, step)
        return costs * self.left_by_refit(routers, thinned(numbers))[0]

    def left_by_refit(
        self, routers: Sequence[Router], numbers: Sequence[int], *, few: int = 0
    ) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """Fraction of the cost of n heads that remains after W_O is refitted, `[L, H + 1]`; 1 for all heads.

        Args:
            numbers: of heads, for which it is measured; between them it is interpolated.
            few: up to this number of heads the refitted weights are returned too, by layer and number.
        """
        h = self.dense.num_heads
        left = torch.ones(len(routers), h + 1, dtype=torch.float64)
        weights: dict[tuple[int, int], Tensor] = {}
        for group in layer_groups(self.dense, matrices=2 * len(numbers) + 2) if numbers else ():
            chosen = {layer: [self.with_number(routers[layer], layer, n) for n in (*numbers, h)] for layer in group}
            batches = self.playback("estimating what a refit regains", self._chosen(COST_TOKENS))
            for layer, (*kept, whole) in collect_several_outputs(self.dense, chosen, batches).items():
                attention = self.dense.attentions[layer]
                measured = [error_left_by_refit(sums, whole.gz, attention.written) for sums in kept]
                left[layer, :-1] = torch.from_numpy(np.interp(range(h), numbers, measured))  # constant beyond them
                for n, sums in zip(numbers, kept, strict=True):
                    if n <= few:
                        weights[layer, n] = refit_output_projection(sums, attention.output_weight)
        return left, weights

    def with_number(self, router: Router, layer: int, heads: int) -> Router:
        """A layer's router for another number of heads, of which at most as many are shared as before."""
        before = router.config
        shared = before.shared_indices
        if len(shared) > heads:
            shared = strongest(self.fits[layer].mean, heads, before)
        return self._with_shared(router, layer, shared, heads)

    def _with_shared(self, router: Router, layer: int, shared: Sequence[int], heads: int) -> Router:
        before = router.config
        kept = before.thresholds if shared == before.shared_indices else None
        config = dataclasses.replace(before, shared_heads=shared, active_heads=heads - len(shared), thresholds=kept)
        made = router.with_config(config)
        if isinstance(made, ThresholdRouter) and kept is None:
            made.fit_thresholds(self._scores[layer])
        return made

    def reallocate(self, routers: Sequence[Router], costs: Tensor, total: int) -> list[Router]:
        """Routers with `total` heads over all layers, distributed by `costs`."""
        used = hand_out(costs, total, step=routers[0].config.step)
        return [self.with_number(router, layer, n) for layer, (router, n) in enumerate(zip(routers, used, strict=True))]

    def share_copying_heads(self, routers: Sequence[Router]) -> list[Router]:
        """The routers, with those heads shared that copy from afar and would be left out where they do (docs/method.md, M21).

        A head that finds what was said thousands of tokens ago is needed at few tokens, and its router can't know at which:
        running text hardly shows it. So the longest samples, if they are long enough, are given an end that repeats parts of
        their beginning. A layer keeps its number of heads.
        """
        used = used_heads(router.config for router in routers)
        least = least_loss(sum(used) / (len(routers) * self.dense.num_heads))
        if self._groups[-1].shape[1] < COPY_LENGTH or least is None:
            return list(routers)
        key = tuple(router.config.shared_indices for router in routers)
        if key not in self._copy_losses:
            numbers = [  # [H + 1][L], for each number of heads of a layer
                [self.with_number(r, layer, max(n, r.config.num_shared)) for layer, r in enumerate(routers)]
                for n in range(self.dense.num_heads + 1)
            ]
            longest = self._groups[-1]
            samples, places = with_copies(longest[self._spread(len(self._groups) - 1, COPY_BLOCKS * longest.shape[1])])
            batches = samples.to(self.dense.device).split(1)
            title = "finding heads that copy from afar"
            bar = tqdm(batches, desc=title, unit="batch", disable=not self._progress)
            self._copy_losses[key] = losses_at(self.dense, numbers, iter(bar), places)
        made = []
        for layer, (router, heads) in enumerate(zip(routers, used, strict=True)):
            config = router.config
            if found := copying_heads(self._copy_losses[key][heads, layer], config, least):
                router = self._with_shared(router, layer, sorted((*config.shared_indices, *found)), heads)
            made.append(router)
        return made

    def refit_outputs(self, routers: Sequence[Router]) -> list[Tensor]:
        """New weights of each layer's output projection."""
        refitted = self.refit_some(dict(enumerate(routers)))
        return [refitted[index] for index in range(len(routers))]

    def refit_some(self, routers: Mapping[int, Router]) -> dict[int, Tensor]:
        """New weights of the output projections of some layers, by index."""
        weights: dict[int, Tensor] = {}
        for group in layer_groups(self.dense, matrices=2):
            chosen = {index: [routers[index]] for index in group if index in routers}
            sums = collect_several_outputs(self.dense, chosen, self.refit_batches()) if chosen else {}
            for index, (of_layer,) in sums.items():
                weights[index] = refit_output_projection(of_layer, self.dense.attentions[index].output_weight)
        return weights

    def fit_output_changes(
        self, routers: Sequence[Router], heads: Sequence[int], *, rank: int = RANK
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Refit each layer's W_O for several numbers of heads, kept as changes of low rank.

        A refit depends on how many heads its layer uses and on no other layer: one change for each number covers every
        distribution of heads.

        Args:
            routers: one per layer; the same for n heads gives the gates that W_O is refitted to.
            heads: numbers of heads.
            rank: largest rank of a change.

        Returns:
            per layer and number `(left [C, r], right [r, H*D])` (`moh.conversion.fit.low_rank_change`).
        """
        factors: list[list[tuple[Tensor, Tensor]]] = []
        for group in layer_groups(self.dense, matrices=2 * len(heads)):
            chosen = {layer: [with_heads(routers[layer], n) for n in heads] for layer in group}
            for layer, sums in collect_several_outputs(self.dense, chosen, self.refit_batches()).items():
                weight = self.dense.attentions[layer].output_weight
                factors.append([low_rank_change(s, weight, rank=rank) for s in sums])
        return factors

    def some(self, tokens: int) -> Tensor:
        """Samples of about this many tokens, of the shortest ones: a loss takes memory by the length."""
        return self._groups[0][self._spread(0, tokens)]

    def _spread(self, group: int, tokens: int) -> Tensor:
        """Samples of a group, spread out: calibration data of several kinds often comes one after the other."""
        samples = self._groups[group]
        return evenly_spread(torch.arange(len(samples)), max(1, tokens // self.dense.tokens_per_sample(samples)))

    def _chosen(self, tokens: int) -> list[int]:
        """Samples of about this many tokens, as many of each length, by their place in the order of all samples."""
        chosen: list[int] = []
        first = 0
        for number, group in enumerate(self._groups):
            chosen += (first + self._spread(number, tokens // len(self._groups))).tolist()
            first += len(group)
        return chosen

    def refit_batches(self) -> Playback:
        """All calibration data, for one pass of refitting."""
        return self.playback("refitting the output projections")

    def playback(self, title: str, chosen: Sequence[int] | None = None) -> Playback:
        """A pass over all calibration data, or over the samples with these indices."""
        rows: dict[int, list[int]] = {}
        for number, row in self._places if chosen is None else [self._places[sample] for sample in chosen]:
            rows.setdefault(number, []).append(row)
        order = tqdm(list(rows), desc=title, unit="batch", disable=not self._progress)
        return Playback(self._recording, order, None if chosen is None else rows)

    def cost_batches(self) -> Iterator[Tensor]:
        """The samples on which gradients show what each layer needs, in smaller batches: the graph takes memory."""
        count = self.dense.samples_per_loss(self.batch_size)
        batches = self.some(COST_TOKENS).to(self.dense.device).split(count)
        title = "estimating what each layer needs"
        return iter(tqdm(batches, desc=title, unit="batch", disable=not self._progress))


def thinned(numbers: Sequence[int]) -> Sequence[int]:
    """At most `REFIT_NUMBERS` of some numbers of heads, evenly spaced."""
    return numbers[:: max(1, math.ceil(len(numbers) / REFIT_NUMBERS))]


def with_heads(router: Router, heads: int) -> Router:
    """The same router for another number of heads, at least its shared ones."""
    active = max(0, heads - router.config.num_shared)
    return router.with_config(dataclasses.replace(router.config, active_heads=active))


def least_heads(num_heads: int) -> int:
    """How many heads each layer of H keeps."""
    return min(LEAST_HEADS, math.ceil(num_heads / 3))


def hand_out(costs: Tensor, total: int, *, step: int = 1) -> list[int]:
    """Heads of each layer with the least summed cost, exactly `total`; at least `least_heads` each where possible.

    Args:
        costs: `[L, H + 1]`, cost of n heads in each layer.
        total: heads over all layers.
        step: every layer's heads are a multiple of it (`MoHConfig.step`), as H is.

    Raises:
        ValueError: `total` is out of reach.
    """
    layers, most = costs.shape[0], costs.shape[1] - 1
    if not layers * step <= total <= layers * most:
        raise ValueError(f"total must be between {layers * step} and {layers * most} heads, got {total}")
    if total % step:
        raise ValueError(f"total must be a multiple of {step} heads, which tokens choose together, got {total}")
    at_least = max(step, min(least_heads(most), total // layers) // step * step)
    return spend([{n: layer[n] for n in range(at_least, most + 1, step)} for layer in costs.tolist()], total)


def dial_costs(costs: Tensor) -> list[list[float]]:
    """The layers' costs as a configuration keeps them for the dial (`head_costs`), with `TOO_FEW` below `least_heads`."""
    few = (least_heads(costs.shape[1] - 1) - torch.arange(costs.shape[1])).clamp_min(0)
    return (costs + TOO_FEW * few.square()).tolist()


def needed_heads(routers: Sequence[Router], costs: Tensor | None, shares: Sequence[float]) -> list[int]:
    """Numbers of heads, below all, that a layer uses at some share or as the routers are set, and those between them.

    Args:
        routers: one per layer.
        costs: `[L, H + 1]`, by which heads are distributed; None for evenly.
        shares: of all heads.

    Raises:
        ValueError: a share is below that of the shared heads.
    """
    config = routers[0].config
    h, step, layers = config.num_heads, config.step, len(routers)
    possible = sorted({r.config.num_shared + k for r in routers for k in allowed_counts(r)})
    lowest = min(used_heads(r.config for r in routers))  # the dial's first position has its own W_O as well
    for share in shares:
        total = round(share * h * layers / step) * step
        if total < sum(r.config.num_shared for r in routers):
            raise ValueError(
                f"shares must be at least {sum(r.config.num_shared for r in routers) / (h * layers):.3f}, the share of "
                f"the shared heads, got {share}"
            )
        lowest = min(lowest, total // layers if costs is None else min(hand_out(costs, total, step=step)))
    # Start at the largest possible number at or below the lowest; each one above it has its own W_O
    first = max((n for n in possible if n <= lowest), default=possible[0])
    return [n for n in possible if first <= n < h]


def keep_output_changes(
    model: PreTrainedModel, heads: Sequence[int], factors: Sequence[Sequence[tuple[Tensor, Tensor]]]
) -> None:
    """Put fitted changes into a model whose W_O is still the original one, and apply those for its number of heads.

    Args:
        model: a MoH model of transformers.
        heads: numbers of heads that have a change, ascending.
        factors: per layer and number `(left [C, r], right [r, H*D])`: W_O transposed, as a linear layer keeps it, changes
            by their product.
    """
    attentions = routed_attentions(model)
    model.config.output_changes = {
        "heads": list(heads),
        "rank": factors[0][0][1].shape[0],
        "used_heads": used_heads(attention.router.config for attention in attentions),
    }
    add_output_changes(model)
    for attention, of_layer in zip(attentions, factors, strict=True):
        projection, changes, config = output_projection(attention), attention.output_changes, attention.router.config
        for index, (left, right) in enumerate(of_layer):
            if isinstance(projection, Conv1D):  # which keeps W_O untransposed
                left, right = right.T, left.T
            changes.left[index].copy_(left)
            changes.right[index].copy_(right)
        used = config.num_shared + config.active_heads
        changes.switch(projection.weight, None, changes.index(used, config.num_heads))
