"""How many heads each layer of the model to be shares and routes: what was asked for, and the default.

Which heads those are is fitted later (`calibrator`), how many a layer uses may be, too (`allocation`).
"""

from __future__ import annotations

from collections.abc import Sequence

from moh.config import MoHConfig
from moh.conversion.dense import DenseModel

SHARED = 2 / 9
"""Share of a layer's heads that every token uses, unless asked for otherwise (measured by
experiments/budgets_in_one_model.py, which takes other numbers too)."""

SHARED_OF_PAPER = 1 / 2
"""The same with the paper's router, which is not fitted: what its converted model shares."""


def default_shared_heads(num_heads: int, router: str = "linear", *, step: int = 1) -> int:
    """How many of a layer's heads are shared if nobody says: 2 in 9, with query norms half of them.

    Args:
        num_heads: H.
        router: `MoHConfig.router`.
        step: `MoHConfig.step`, a multiple of which it is, rounded down; at least 1 where that allows it.
    """
    share = SHARED_OF_PAPER if router == "query_norm" else SHARED
    return max(1, round(share * num_heads)) // step * step


def requested_layers(
    dense: DenseModel,
    shared_heads: int | Sequence[int] | None,
    active_heads: int | Sequence[int],
    router: str,
    unit: str,
) -> list[MoHConfig]:
    """Each layer's heads as asked for.

    Args:
        shared_heads: a number, indices, or None for the default.
        active_heads: a number, or one per layer.
        unit: `MoHConfig.routing_unit`.

    Raises:
        ValueError: one of them is out of range, or the model has no groups for such a unit.
    """
    count = len(dense.attentions)
    active = [active_heads] * count if isinstance(active_heads, int) else list(active_heads)
    if len(active) != count:
        raise ValueError(
            f"active_heads must be a number or have one entry per layer ({count}), got {len(active)} entries"
        )
    if unit != "head" and dense.kv_heads is None:
        raise ValueError(
            f"routing_unit must be 'head' for a {type(dense.model).__name__}, whose heads don't share keys and values in "
            f"groups, got {unit!r}"
        )
    h, kv_heads = dense.num_heads, None if unit == "head" else dense.kv_heads
    if shared_heads is None:
        step = MoHConfig(h, h, 0, router, routing_unit=unit, kv_heads=kv_heads).step
        shared_heads = default_shared_heads(h, router, step=step)
    return [MoHConfig(h, shared_heads, k, router, routing_unit=unit, kv_heads=kv_heads) for k in active]
