"""What `moh.convert` is asked for: the heads of each layer, and which arguments go together."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from moh.config import FIXED, ROUTERS, MoHConfig
from moh.conversion.dense import DenseModel
from moh.conversion.transformers import DenseTextModel
from moh.models.heads import heads_of_share, total_of_share
from moh.routing import router_class

ALLOCATIONS = ("even", "sensitivity")
"""How `moh.convert` distributes the heads: the same number in every layer, or more to layers that need them more."""

LAYERS = ("keep", "drop", "mix")
"""What may become of a layer: it keeps heads; it keeps all or none; it is routed, fixed or without heads."""

RANKING = " or ".join(repr(name) for name in ROUTERS if router_class(name).ranks_heads)
"""Routers that the uneven allocation and the refits of W_O work with, for messages."""


def requested_layers(
    dense: DenseModel,
    share: float | None,
    shared_heads: int | Sequence[int] | None,
    active_heads: int | Sequence[int] | None,
    router: str,
    unit: str,
) -> list[MoHConfig]:
    """Each layer's heads as requested.

    Args:
        share: of all heads; None where `active_heads` is given.
        shared_heads: a number, indices, or None for the default.
        active_heads: a number, or one per layer.
        unit: `MoHConfig.routing_unit`.

    Raises:
        ValueError: one of them is out of range, or the model has no groups for such a unit.
    """
    count = len(dense.attentions)
    if unit != "head" and dense.kv_heads is None:
        raise ValueError(
            f"routing_unit must be 'head' for a {type(dense.model).__name__}, whose heads don't share keys and values in "
            f"groups, got {unit!r}"
        )
    h, kv_heads = dense.num_heads, None if unit == "head" else dense.kv_heads
    is_fixed = router == FIXED
    if is_fixed and shared_heads is not None:
        raise ValueError(
            f"shared_heads must be left out for router={FIXED!r}, where active_heads is how many heads a layer keeps, got "
            f"{shared_heads!r}"
        )
    if shared_heads is None:
        step = MoHConfig(h, h, 0, router, routing_unit=unit, kv_heads=kv_heads).step
        default = 0 if is_fixed else router_class(router).default_shared_heads(h, step=step)
        if share is not None:
            shared_heads, active_heads = heads_of_share(share, h, default_shared=default, step=step)
        else:
            shared_heads = default
    active = [active_heads] * count if isinstance(active_heads, int) else list(active_heads or ())
    if len(active) != count:
        raise ValueError(
            f"active_heads must be a number or have one entry per layer ({count}), got {len(active)} entries"
        )
    if is_fixed:
        if not sum(active) > 0 or not all(0 <= k <= h for k in active):
            raise ValueError(
                f"active_heads must be between 0 and {h} in each layer for router={FIXED!r}, and not 0 in all, got "
                f"{active_heads}"
            )
        return [MoHConfig(h, k, 0, router, routing_unit=unit, kv_heads=kv_heads) for k in active]
    return [MoHConfig(h, shared_heads, k, router, routing_unit=unit, kv_heads=kv_heads) for k in active]


def requested_total(layers: Sequence[MoHConfig], share: float | None) -> int:
    """Heads of all layers together, as requested: with a share nearer to it than the sum of each layer's nearest number."""
    if share is None:
        return sum(c.num_shared + c.active_heads for c in layers)
    return total_of_share(share, len(layers), layers[0].num_heads, step=layers[0].step)


def check_fit(
    dense: DenseModel,
    router: str,
    allocation: str,
    refit_output: bool,
    shared_heads: int | Sequence[int] | None,
    calibration: object,
    batch_size: int,
) -> None:
    """Refuse what can't be fitted so.

    Raises:
        ValueError: an argument is out of range, or the router or the model needs another.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(map(repr, ALLOCATIONS))}, got {allocation!r}")
    if router != FIXED and not router_class(router).ranks_heads and (allocation != "even" or refit_output):
        raise ValueError(
            f"allocation='sensitivity' and refit_output=True need router={RANKING} or {FIXED!r}, got router={router!r}"
        )
    if allocation == "sensitivity" and not isinstance(shared_heads, int | None):
        raise ValueError("shared_heads must be a number for allocation='sensitivity', got a list of heads")
    if calibration is None and dense.needs_calibration(router):
        kind = "texts or token ids" if isinstance(dense, DenseTextModel) else "images"
        raise ValueError(f"calibration must be given for router={router!r}: {kind} to fit the router on")


def check_layers(layers: str, router: str, allocation: str, shares: Sequence[float] | None, *, generates: bool) -> None:
    """Refuse what `layers` can't be combined with.

    Raises:
        ValueError: `layers` is unknown, or another argument or the model rules it out.
    """
    if layers not in LAYERS:
        raise ValueError(f"layers must be one of {', '.join(map(repr, LAYERS))}, got {layers!r}")
    if layers == "drop" and router != FIXED:
        raise ValueError(
            f"router must be None or {FIXED!r} for layers='drop', which leaves nothing to route, got {router!r}"
        )
    if layers == "mix" and router != FIXED and not router_class(router).ranks_heads:
        raise ValueError(f"router must be {RANKING} or {FIXED!r} for layers='mix', got {router!r}")
    if layers != "keep" and not generates:
        raise ValueError(
            f"layers must be 'keep' for this model, got {layers!r}: what a layer without heads costs is measured by the loss of "
            "a language model that generates"
        )
    if layers != "keep" and allocation != "sensitivity":
        raise ValueError(f"allocation must be 'sensitivity' for layers={layers!r}, got {allocation!r}")
    if shares is not None and (layers != "keep" or router == FIXED):
        raise ValueError(
            f"shares needs layers that all route: router={RANKING} and layers='keep', got router={router!r} and "
            f"layers={layers!r}"
        )


def check_shares(dense: DenseModel, shares: Sequence[float], *, router: str, refit_output: bool) -> None:
    """Refuse shares for which no W_O can be kept.

    Raises:
        ValueError: the shares are out of range, or the model or another argument rules them out.
    """
    if not router_class(router).ranks_heads:
        raise ValueError(f"shares needs router={RANKING}, got router={router!r}")
    if refit_output:
        raise ValueError("refit_output must be False where shares is given, which refits W_O for each of them")
    if (
        isinstance(shares, str)
        or not len(shares)
        or not all(isinstance(share, float | int) and 0 < share <= 1 for share in shares)
    ):
        raise ValueError(f"shares must be above 0 and at most 1, got {shares!r}")
    if not isinstance(dense.model, PreTrainedModel):
        raise ValueError(
            f"shares must be None for a {type(dense.model).__name__}: only models of transformers can keep a W_O for each "
            "number of heads; the dial (moh.set_active_heads) works without them"
        )
