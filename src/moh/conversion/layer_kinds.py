"""Models whose layers may differ in kind: routed, with fixed heads, or without any (`moh.convert(router="fixed", layers=...)`).

Fits each kind for every layer, states what it costs with every number of heads, and assembles what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from moh.config import FIXED, MoHConfig
from moh.conversion.allocation import Change, Meter, Options, allocate, few_heads
from moh.conversion.calibrator import TOO_FEW, Calibrator, thinned
from moh.conversion.dense import OutputWeight
from moh.conversion.fit import fit_linear_map, order_of_removal
from moh.conversion.fixed import FixedFit
from moh.conversion.passes import RanksHeads, collect_heads, costs_of_choices, layer_groups
from moh.conversion.transformers import DenseTextModel
from moh.routing import Router, build_router

MEASURED_TOKENS = 1024
"""Calibration tokens on which the cost of few heads is measured, one forward pass for each layer in question."""


class LayerKinds:
    """The kinds of layers that a model may be made of: fixed ones, and with a router that chooses also routed ones.

    Args:
        calibrator: of the dense model.
        requested: each layer's heads; all fixed, or all with one router.
        refitted: W_O will be refitted, and a layer without heads gets a linear map of its input.
        total: heads over all layers, for `choose`; None means those of `requested`.

    Attributes:
        routers: of routed layers, one per layer, or none.
    """

    def __init__(
        self, calibrator: Calibrator, requested: Sequence[MoHConfig], *, refitted: bool, total: int | None = None
    ) -> None:
        self._calibrator, self._requested, self._refitted = calibrator, requested, refitted
        self._used = [layer.num_shared + layer.active_heads for layer in requested]
        self._total = sum(self._used) if total is None else total
        is_fixed = requested[0].router == FIXED
        self.routers: Sequence[Router] = [] if is_fixed else calibrator.fit_routers(requested, refitted=refitted)

    @cached_property
    def fixed(self) -> list[FixedFit]:
        """Which heads each layer can do without if the same heads are left out for every token."""
        dense, fits = self._calibrator.dense, []
        for group in layer_groups(dense, matrices=4):
            sums = collect_heads(dense, group, self._calibrator.playback("comparing the heads"), inputs=self._refitted)
            for index in group:
                of_layer, attention = sums[index], dense.attentions[index]
                heads, left = order_of_removal(of_layer.zz, attention.written, self._requested[index])
                linear = None
                if self._refitted:
                    linear = fit_linear_map(of_layer.xx, of_layer.xz, of_layer.zz, attention.output_weight)
                    left[0] = linear.left
                left = left if self._refitted else torch.ones_like(left)
                fits.append(FixedFit(attention, heads, left, of_layer.zz, linear))
        return fits

    def choose(self, layers: str) -> tuple[list[tuple[int, int]], Tensor | None]:
        """The kind and number of heads of each layer, of the requested total, by what they cost.

        Args:
            layers: as `moh.convert` takes it.

        Returns:
            for each layer 0 for fixed or 1 for routed, and how many heads; and what routed layers are estimated to cost,
            `[L, H + 1]`, None without any.
        """
        options = self.options(layers)
        chosen = allocate(options, self._total, self.meter())
        h = self._calibrator.dense.num_heads
        return chosen, options[-1].costs.nan_to_num(posinf=TOO_FEW * h**2) if self.routers else None

    def as_requested(self) -> list[tuple[int, int]]:
        """Fixed heads, as many in each layer as requested; as `choose`."""
        return [(0, n) for n in self._used]

    def meter(self) -> Meter | None:
        """What measures the cost of few heads, if the model has a loss that shows it: if it generates."""
        dense = self._calibrator.dense
        if not isinstance(dense, DenseTextModel) or not dense.model.can_generate():
            return None
        samples = self._calibrator.some(MEASURED_TOKENS).to(dense.device)
        return Meter(dense, iter(samples.split(self._calibrator.batch_size)))

    def options(self, layers: str) -> list[Options]:
        """What each layer may become and is estimated to cost: fixed and, if there are routers, routed."""
        calibrator, routers, fixed = self._calibrator, self.routers, self.fixed
        dense, step, h = calibrator.dense, self._requested[0].step, calibrator.dense.num_heads
        rankings: list[Sequence[RanksHeads]] = [fixed, routers] if routers else [fixed]
        costs = costs_of_choices(dense, rankings, calibrator.cost_batches())
        numbers = torch.arange(h + 1)
        allowed = numbers % step == 0
        if layers == "drop":
            allowed &= numbers % h == 0
        if layers == "keep":
            # Without a measure, estimates of few heads can't be trusted
            can_measure = isinstance(dense, DenseTextModel) and dense.model.can_generate()
            allowed &= numbers >= (1 if can_measure else min(few_heads(h), *self._used))
        of_fixed = costs[0] * torch.stack([fit.left for fit in fixed])
        options = [Options(of_fixed.where(allowed, torch.inf), lambda layer, n: fixed[layer].change(n, self._refitted))]
        if not routers:
            return options
        weights: dict[tuple[int, int], Tensor] = {}
        of_routed = costs[1]
        if self._refitted:
            few = [n for n in range(step, h, step) if n <= few_heads(h)]
            more = range(step, h, step)[len(few) :]
            left, weights = calibrator.left_by_refit(routers, [*few, *thinned(more)], few=few_heads(h))
            of_routed = of_routed * left
        of_routed[:, 0] = torch.inf

        def change(layer: int, n: int) -> Change:
            router = calibrator.with_number(routers[layer], layer, n)
            return _routed(router, weights.get((layer, n), dense.attentions[layer].output_weight))

        return [*options, Options(of_routed.where(allowed, torch.inf), change)]

    def assemble(self, chosen: Sequence[tuple[int, int]]) -> tuple[list[Router], list[OutputWeight]]:
        """The router and the output projection of each layer, whose kinds and numbers of heads are `chosen`, as by `choose`."""
        calibrator, attentions = self._calibrator, self._calibrator.dense.attentions
        made: list[Router] = []
        weights: dict[int, OutputWeight] = {}
        for index, (kind, n) in enumerate(chosen):
            if kind == 0:
                made.append(build_router(self.fixed[index].config(n, self._requested[index]), attentions[index].width))
                weights[index] = self.fixed[index].weight(n, self._refitted)
            else:
                made.append(calibrator.with_number(self.routers[index], index, n))
        routed = {index: router for index, router in enumerate(made) if index not in weights}
        refitted = calibrator.refit_some(routed) if self._refitted else {}
        for index in routed:
            weights[index] = OutputWeight(refitted.get(index, attentions[index].output_weight.detach().clone()))
        return made, [weights[index] for index in range(len(made))]


def _routed(router: Router, weight: Tensor) -> Change:
    def change(x: Tensor, z: Tensor) -> Tensor:
        gates = router(x.float()).gates.to(z.dtype)  # [B, N, H]
        kept = (z.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]).flatten(-2)
        return nn.functional.linear(kept, weight.to(kept))

    return change
