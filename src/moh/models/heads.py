"""The heads of each layer of a model, from its configuration: one number for all layers or one per layer.

Shared by the models of all families; a single layer's part is a `moh.MoHConfig`. Also what a share of the heads means for a
layer (`heads_of_share`). Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moh.config import MoHConfig

DEFAULT_SHARE = 0.75
"""Share of its heads that each token of a converted model uses, if nothing else is requested."""


def requested_share(share: object = None, *, shared_heads: object = None, active_heads: object = None) -> float | None:
    """The share of heads that a conversion's arguments request; None where they give numbers of heads.

    Args:
        share: of all heads, in (0, 1]; None for `DEFAULT_SHARE`, unless there are numbers.
        shared_heads: None, or a number or a sequence.
        active_heads: likewise; enough by itself.

    Raises:
        ValueError: both are given, or the share is out of range, or `shared_heads` is given alone.
    """
    if share is None and active_heads is not None:
        return None
    if share is None and shared_heads is not None:
        raise ValueError(
            f"active_heads must be given with shared_heads = {shared_heads}; or leave both out and give a share of all heads"
        )
    if shared_heads is not None or active_heads is not None:
        raise ValueError(
            f"share must be left out where shared_heads or active_heads is given, got {share!r}: a share sets both"
        )
    if share is None:
        return DEFAULT_SHARE
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share must be a number above 0 and at most 1, such as 0.75 of all heads, got {share!r}")
    return float(share)


def heads_of_share(share: float, num_heads: int, *, default_shared: int, step: int = 1) -> tuple[int, int]:
    """(h_s, k) of a layer, its shared and its active routed heads, whose sum is as near to a share as the layer allows.

    Args:
        share: of all heads, in (0, 1].
        num_heads: h.
        default_shared: shared heads of a layer that uses many heads. At most two thirds of the heads in use are shared, as in
            the paper's conversion (16 of 24), so that with a small share tokens still have something to choose.
        step: both numbers are multiples of it (`MoHConfig.step`).

    Raises:
        ValueError: the nearest number of heads is 0.
    """
    used = math.floor(share * num_heads / step + 0.5) * step
    if used == 0:
        what = "head" if step == 1 else f"choice of {step} heads"
        raise ValueError(
            f"share must be at least {step / num_heads:.3f}, one {what} of a layer's {num_heads}, got {share:g}"
        )
    shared = min(default_shared, 2 * used // 3) // step * step
    return shared, used - shared


def total_of_share(share: float, layers: int, num_heads: int, *, step: int = 1) -> int:
    """Heads over all layers whose number is nearest to a share of them; at least one choice of heads in each layer.

    Args:
        share: of all heads, in (0, 1].
        layers: how many there are.
        num_heads: h of each.
        step: a multiple of it in each layer (`MoHConfig.step`).
    """
    return max(layers, math.floor(share * (layers * num_heads) / step + 0.5)) * step


def layer_configs(
    num_layers: int,
    num_heads: int | Sequence[int],
    *,
    shared_heads: int | Sequence[int | Sequence[int]] | None,
    active_heads: int | Sequence[int],
    router: str | Sequence[str],
    routing_unit: str = "head",
    kv_heads: int | None = None,
    thresholds: Sequence[Sequence[float] | None] | None = None,
) -> list[MoHConfig]:
    """The heads and routing of each layer.

    Args:
        num_layers: layers of the model.
        num_heads: h, one number for every layer or a list with one per layer.
        shared_heads: a number (every layer shares its first heads), or a list with one entry per layer: a number or
            the list of that layer's shared heads. None shares all heads that are not active routed ones.
        active_heads: routed heads active per token, a number or a list with one per layer.
        router: as in `moh.MoHConfig`, one name or a list with one per layer.
        routing_unit: `moh.config.ROUTING_UNITS`.
        kv_heads: key/value heads of every layer; ignored by the unit "head".
        thresholds: those of each layer with router="threshold".

    Raises:
        ValueError: the heads of a layer don't add up; the message names the layer, the field and what is allowed.
    """
    layers = []
    for index in range(num_layers):
        heads = _of_layer("num_attention_heads", num_heads, index, num_layers)
        active = _of_layer("active_heads", active_heads, index, num_layers)
        shared = _of_layer("shared_heads", shared_heads, index, num_layers)
        if shared is None:
            shared = heads - active
        try:
            groups = None if routing_unit == "head" else kv_heads
            name = _of_layer("router", router, index, num_layers)
            own = _of_layer("thresholds", thresholds, index, num_layers)
            layers.append(MoHConfig(heads, shared, active, name, routing_unit, groups, own))
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
    return layers


class HasLayerHeads:
    """Mixed into a configuration of transformers that has the fields `router`, `shared_heads` and `active_heads`."""

    num_hidden_layers: int
    num_attention_heads: int
    router: str | list[str]
    shared_heads: int | list[int | list[int]] | None
    active_heads: int | list[int]
    router_aux_loss_coef: float
    routing_unit: str = "head"

    thresholds = None
    """`[L][h_r + 1]`, the thresholds of layers with router="threshold" (`MoHConfig.thresholds`), None for another layer; None if
    no layer has such a router."""

    head_costs = None
    """`[L][H + 1]`, each layer's estimated loss (nats per token) with 0 to H heads, as measured by the conversion; None
    if it was not. The dial (`moh.set_active_heads`) distributes a share of heads by it."""

    output_changes: dict[str, Any] | None = None
    """`{"heads": [...], "rank": r, "used_heads": [...]}` where each layer has a W_O for several numbers of heads
    (`moh.models.output_changes`); None if one W_O is used for all."""

    def check_heads(self) -> None:
        """Check the fields.

        Raises:
            ValueError: the heads of a layer don't add up, the weight of the balance loss is below 0, or the model was saved
                with changes of W_O in the format before the first release.
        """
        if getattr(self, "output_budgets", None) is not None:
            raise ValueError(
                "output_budgets in the configuration is a format from before the first release, whose weights this version "
                "can't read: convert the dense model again, with moh.convert(..., shares=[...])"
            )
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef must be at least 0, got {self.router_aux_loss_coef}")
        for index, layer in enumerate(self.layer_configs()):
            if layer.router == "threshold" and layer.thresholds is None:
                raise ValueError(
                    f"layer {index}: thresholds must be given for router='threshold': convert the dense model, which fits them"
                )

    @property
    def num_attention_layers(self) -> int:
        """Layers that have heads."""
        return self.num_hidden_layers

    def layer_configs(self) -> list[MoHConfig]:
        """The heads and routing of each layer that has heads.

        Raises:
            ValueError: the heads of a layer don't add up; the message names the layer, the field and what is allowed.
        """
        return layer_configs(
            self.num_attention_layers,
            self.num_attention_heads,
            shared_heads=self.shared_heads,
            active_heads=self.active_heads,
            router=self.router,
            routing_unit=self.routing_unit,
            kv_heads=getattr(self, "num_key_value_heads", None),
            thresholds=self.thresholds,
        )

    @property
    def share(self) -> float:
        """Mean share of the heads that a token uses, over the layers."""
        return mean_share(self.layer_configs())


def mean_share(layers: Sequence[MoHConfig]) -> float:
    """Mean share of the heads that a token uses, over the layers."""
    return sum(layer.share for layer in layers) / len(layers)


def varies_by_token(layers: Sequence[MoHConfig]) -> bool:
    """Whether a layer's tokens may use different numbers of heads, so that its configuration's number is an average."""
    return any(layer.router == "threshold" for layer in layers)


def use_of_heads(layers: Sequence[MoHConfig], share: float, heads: str = "heads") -> str:
    """A model's share of heads as a clause: "each token uses 75 % of the heads"."""
    used = f"{100 * share:.0f} % of the {heads}"
    return f"tokens use {used} on average" if varies_by_token(layers) else f"each token uses {used}"


def compact_heads(layers: Sequence[MoHConfig]) -> dict[str, Any]:
    """`shared_heads` and `active_heads` as `layer_configs` takes them: one number where all layers have the same."""
    shared = [c.shared_heads if isinstance(c.shared_heads, int) else list(c.shared_indices) for c in layers]
    return {"shared_heads": _compact(shared), "active_heads": _compact([c.active_heads for c in layers])}


def thresholds_of(layers: Sequence[MoHConfig]) -> dict[str, Any]:
    """`thresholds` as `layer_configs` takes them, if a layer has some."""
    found = [None if layer.thresholds is None else list(layer.thresholds) for layer in layers]
    return {"thresholds": found} if any(found) else {}


def compact_router(layers: Sequence[MoHConfig]) -> str | list[str]:
    """`router` as `layer_configs` takes it: one name where all layers have the same."""
    names = [layer.router for layer in layers]
    return names[0] if len(set(names)) == 1 else names


def _of_layer(name: str, value: Any, index: int, num_layers: int) -> Any:
    if not isinstance(value, list | tuple):
        return value
    if len(value) != num_layers:
        raise ValueError(
            f"{name} must be a number or a list with one entry per layer ({num_layers}), got {len(value)} entries"
        )
    return value[index]


def _compact(values: list[Any]) -> Any:
    return values[0] if isinstance(values[0], int) and len(set(map(str, values))) == 1 else values
