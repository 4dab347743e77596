"""One calibration for many models: routed, fixed and dropped heads at any number of heads, from what is fitted once.

`moh.convert` makes one model and forgets what it fitted. Where several are compared, as in the report of a conversion
(`moh.evaluation.conversion_report`), `Fitted` keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moh.config import FIXED, MoHConfig
from moh.conversion.allocation import Meter, Options, allocate
from moh.conversion.calibrator import TOO_FEW, Calibrator, dial_costs
from moh.conversion.dense import OutputWeight
from moh.conversion.layer_kinds import LayerKinds
from moh.conversion.transformers import DenseTextModel
from moh.models.heads import total_of_share
from moh.routing import Router, router_class

ROUTED, MIXED, FIXED_HEADS = "routed (default)", "routed, fixed or none", "fixed heads"
DROPPED, DROPPED_LINEAR = "layers dropped", "layers dropped, linear map"
METHODS = (ROUTED, MIXED, FIXED_HEADS, DROPPED_LINEAR, DROPPED)
"""What a model can be made of. In `moh.convert`'s arguments: none, layers="mix", router="fixed", layers="drop", and the last
with refit_output=False."""


@dataclass
class Made:
    """What a method made of a dense model.

    Attributes:
        used: heads per layer.
        cached: key/value heads per layer that the cache holds.
        model: the model; it shares with the dense one every weight that is not refitted.
    """

    used: list[int]
    cached: list[int]
    model: PreTrainedModel


class Fitted:
    """A dense language model and all that is fitted to it once, for every method and number of heads.

    Each piece is fitted when it is first needed.

    Args:
        dense: a model that generates; it must not be changed while models made of it are in use.
        blocks: calibration tokens `[n, N]`, or such of several lengths, the shortest first.
        router: of routed layers, "threshold" (`moh.convert`'s default) or "linear".
        batch_size: blocks per forward pass.
        progress: show progress bars.

    Attributes:
        adapter: of the dense model.
        calibrator: of its calibration.
        router: as given.

    Raises:
        ValueError: the model can't be converted, or its attention has no heads of its own to fix or drop.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        blocks: Tensor | Sequence[Tensor],
        *,
        router: str = "threshold",
        batch_size: int = 4,
        progress: bool = False,
    ) -> None:
        self.adapter = DenseTextModel(dense, router, copied=False)
        refusal = self.adapter.refusal(router=FIXED, refit_output=True, router_aux_loss_coef=0.0)
        if refusal is not None:
            raise ValueError(refusal)
        if not dense.can_generate():
            raise ValueError(
                f"dense must be a language model that generates, whose loss shows what heads are worth, got a "
                f"{type(dense).__name__}"
            )
        self.calibrator = Calibrator(self.adapter, blocks, batch_size, progress)
        self.router = router
        h = self.adapter.num_heads
        self._requested = [MoHConfig(h, router_class(router).default_shared_heads(h), 1, router)] * self.layers

    @property
    def layers(self) -> int:
        """Attention layers of the model."""
        return len(self.adapter.attentions)

    def total(self, share: float) -> int:
        """Heads over all layers that are nearest to a share of them, as in `moh.convert`."""
        return total_of_share(share, self.layers, self.adapter.num_heads)

    @cached_property
    def kinds(self) -> LayerKinds:
        """Fixed and routed layers."""
        return LayerKinds(self.calibrator, self._requested, refitted=True)

    @cached_property
    def _kinds_without_refit(self) -> LayerKinds:
        """Layers with all of their heads, or that add nothing."""
        h = self.adapter.num_heads
        return LayerKinds(self.calibrator, [MoHConfig(h, h, 0, FIXED)] * self.layers, refitted=False)

    @cached_property
    def _costs(self) -> Tensor:
        return self.calibrator.costs(self.kinds.routers, refitted=True)

    @cached_property
    def _options(self) -> dict[str, list[Options]]:
        mixed = self.kinds.options("mix")
        fixed = mixed[0]
        all_or_none = torch.arange(fixed.costs.shape[1]) % self.adapter.num_heads == 0
        dropped = dataclasses.replace(fixed, costs=fixed.costs.where(all_or_none, torch.inf))
        return {MIXED: mixed, FIXED_HEADS: [fixed], DROPPED_LINEAR: [dropped]}

    @cached_property
    def _options_without_refit(self) -> list[Options]:
        return self._kinds_without_refit.options("drop")[:1]

    @cached_property
    def _meter(self) -> Meter | None:
        return self.kinds.meter()

    def make(self, method: str, total: int) -> Made:
        """The model by a method, with this many heads over all layers, or as near to it as the method allows.

        Raises:
            ValueError: the method is unknown, or so many heads are out of reach.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        if method == ROUTED:
            return self._built(*self.routed(total), self._costs)
        kinds = self._kinds_without_refit if method == DROPPED else self.kinds
        options = self._options_without_refit if method == DROPPED else self._options[method]
        # What is measured corrects the estimates, the more, the fewer heads were tried: no model depends on those before
        own = [dataclasses.replace(kind, costs=kind.costs.clone(), measured={}) for kind in options]
        chosen = allocate(own, total, self._meter)
        of_routed = own[-1].costs.nan_to_num(posinf=TOO_FEW * self.adapter.num_heads**2) if method == MIXED else None
        return self._built(*kinds.assemble(chosen), of_routed)

    def routed(self, total: int, *, copying: bool = True) -> tuple[list[Router], list[OutputWeight]]:
        """The router and the output projection of each layer of the model whose layers all route.

        Args:
            total: heads over all layers.
            copying: share heads that copy from afar, as `moh.convert` does.
        """
        routers = self.calibrator.reallocate(self.kinds.routers, self._costs, total)
        if copying:
            routers = self.calibrator.share_copying_heads(routers)
        return routers, [OutputWeight(weight) for weight in self.calibrator.refit_outputs(routers)]

    def _built(self, routers: list[Router], weights: list[OutputWeight], costs: Tensor | None) -> Made:
        """The model; the dial distributes heads by `costs`, if there are any."""
        configs = [router.config for router in routers]
        model = self.adapter.build(configs, routers, weights, router_aux_loss_coef=0.0)
        if costs is not None:
            model.config.head_costs = dial_costs(costs)
        h, kv_heads = self.adapter.num_heads, self.adapter.kv_heads or self.adapter.num_heads
        cached = [
            len({head * kv_heads // h for head in c.shared_indices}) if c.router == FIXED else kv_heads for c in configs
        ]
        return Made([c.num_shared + c.active_heads for c in configs], cached, model)
