"""The models of `budget_curve.py`: the results of one calibration, and each variant made from them.

For a single model use `moh.convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moh.config import ROUTING_UNITS, MoHConfig
from moh.conversion import convert
from moh.conversion.calibrator import Calibrator, hand_out
from moh.conversion.fit import refit_output_projection
from moh.conversion.passes import collect_several_outputs
from moh.conversion.transformers import DenseTextModel
from moh.routing import LinearRouter, router_class
from moh.routing.units import strongest

UNITS = ROUTING_UNITS
QUERY_NORM, TWO_STAGE = "query norm", "two-stage, fitted"
LINEAR, REFITTED = "contribution", "contribution, uneven shares, refitted W_O"
ROUTERS = (QUERY_NORM, TWO_STAGE, LINEAR, REFITTED)


@dataclass(frozen=True)
class Variant:
    """One row: routing unit, router, and the mean number of heads per layer that a token uses."""

    unit: str
    router: str
    heads: int

    @property
    def key(self) -> str:
        return f"{self.unit} / {self.router} / {self.heads}"

    def describe(self, model: PreTrainedModel) -> dict[str, Any]:
        layers = model.config.layer_configs()
        used = [c.num_shared + c.active_heads for c in layers]
        return {
            "unit": self.unit,
            "router": self.router,
            "heads": self.heads,
            "share": model.config.share,
            "used": used,
        }


@dataclass(frozen=True)
class Fitted:
    """The results of calibration, for all variants.

    Attributes:
        routers: LINEAR or REFITTED -> for each layer the state of the contribution router.
        means: the same -> for each layer the mean contribution of its heads, `[H]`.
        costs: unit -> `[L, H + 1]`, each layer's estimated loss after the refit of W_O.
        outputs: unit -> for each layer, number of heads -> its refitted W_O.
    """

    routers: dict[str, list[dict[str, Tensor]]]
    means: dict[str, list[Tensor]]
    costs: dict[str, Tensor]
    outputs: dict[str, list[dict[int, Tensor]]]

    def model(self, dense: PreTrainedModel, variant: Variant, *, refit: bool = True) -> PreTrainedModel:
        """The MoH model of a variant, on the dense model's own tensors."""
        layers, step = dense.config.num_hidden_layers, step_of(dense, variant.unit)
        if variant.router == QUERY_NORM:
            config = replace(_config(dense, variant.unit, variant.heads), router="query_norm")
            adapter = DenseTextModel(dense, "query_norm", copied=False)
            return adapter.build([config] * layers, (), (), router_aux_loss_coef=0.0)
        used = [variant.heads] * layers
        if variant.router == REFITTED:
            used = hand_out(self.costs[variant.unit], variant.heads * layers, step=step)
        routers = [self.router(dense, variant, layer, n) for layer, n in enumerate(used)]
        outputs: Sequence[Tensor] = ()
        if refit and variant.router == REFITTED:
            original = [layer.self_attn.o_proj.weight for layer in dense.model.layers]
            outputs = [self.outputs[variant.unit][i].get(n, original[i]) for i, n in enumerate(used)]
        adapter = DenseTextModel(dense, "linear", copied=False)
        return adapter.build([r.config for r in routers], routers, outputs, router_aux_loss_coef=0.0)

    def router(self, dense: PreTrainedModel, variant: Variant, layer: int, heads: int) -> LinearRouter:
        """The contribution router of a layer that uses `heads` heads."""
        config = _config(dense, variant.unit, heads, self.means[variant.router][layer])
        router = LinearRouter(config, dense.config.hidden_size)
        router.load_state_dict(self.routers[variant.router][layer])
        return router


def fit(dense: PreTrainedModel, calibration: Tensor, file: Path) -> Fitted:
    """Calibrate, or read an earlier run's results from `file`."""
    if file.exists():
        return Fitted(**torch.load(file))
    adapter = DenseTextModel(dense, "linear", copied=False)
    calibrator = Calibrator(adapter, calibration, 2, progress=False)
    any_layer = MoHConfig(_heads(dense), 0, _heads(dense) - 1, "linear")
    layers = range(dense.config.num_hidden_layers)
    fitted = Fitted({}, {}, {}, {})
    for name in (LINEAR, REFITTED):
        routers = calibrator.fit_routers([any_layer for _ in layers], refitted=name == REFITTED)
        fitted.routers[name] = [router.state_dict() for router in routers]
        fitted.means[name] = [f.mean for f in calibrator.fits]
    for unit in UNITS:
        h, step = _heads(dense), step_of(dense, unit)
        middle = Variant(unit, REFITTED, (2 * h // 3) // step * step)
        fitted.costs[unit] = calibrator.costs(
            [fitted.router(dense, middle, layer, middle.heads) for layer in layers], refitted=True
        )
        numbers = range(step if step > 1 else min(3, h - 1), h, step)
        chosen = {layer: [fitted.router(dense, middle, layer, n) for n in numbers] for layer in layers}
        sums = collect_several_outputs(adapter, chosen, iter(calibration.split(2)))
        fitted.outputs[unit] = [
            {
                n: refit_output_projection(s, adapter.attentions[layer].output_weight)
                for n, s in zip(numbers, sums[layer], strict=True)
            }
            for layer in layers
        ]
        del sums  # gigabytes
        print(f"{unit}: calibrated", flush=True)
    torch.save(vars(fitted), file)
    return fitted


def two_stage(dense: PreTrainedModel, variant: Variant, calibration: Tensor) -> PreTrainedModel:
    """The MoH model of a variant with the paper's learned router, fitted to rank the heads by their contributions."""
    shared = _shared_heads(dense, variant.heads, step_of(dense, variant.unit))
    model: PreTrainedModel = convert(
        dense,
        shared_heads=shared,
        active_heads=variant.heads - shared,
        router="two_stage",
        routing_unit=variant.unit,
        calibration=calibration,
        calibration_tokens=calibration.numel(),
        batch_size=2,
        progress=False,
    )
    return model


def step_of(dense: PreTrainedModel, unit: str) -> int:
    """The number of heads of a layer is a multiple of this."""
    return _config(dense, unit, _heads(dense)).step


def _heads(dense: PreTrainedModel) -> int:
    heads: int = dense.config.num_attention_heads
    return heads


def _shared_heads(dense: PreTrainedModel, heads: int, step: int) -> int:
    """How many of a layer's heads are shared by default, at most all heads in use."""
    return min(router_class("linear").default_shared_heads(_heads(dense), step=step), heads)


def _config(dense: PreTrainedModel, unit: str, heads: int, mean: Tensor | None = None) -> MoHConfig:
    """A layer of `heads` heads; shared: with `mean` the default number, those with the largest, else the first half."""
    h, kv_heads = _heads(dense), dense.config.num_key_value_heads
    options = {"routing_unit": unit, "kv_heads": None if unit == "head" else kv_heads}
    step = MoHConfig(h, 0, h, "linear", **options).step
    shared = heads // 2 // step * step if mean is None else _shared_heads(dense, heads, step)
    config = MoHConfig(h, shared, heads - shared, "linear", **options)
    if mean is None:
        return config
    return MoHConfig(h, strongest(mean, shared, config), heads - shared, "linear", **options)
