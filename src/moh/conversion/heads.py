"""How many heads each layer of the model to be shares and routes: what was asked for, and the default.

Which heads those are is fitted later (`calibrator`), how many a layer uses may be, too (`allocation`).
"""

from __future__ import annotations

from collections.abc import Sequence

from moh.config import MoHConfig
from moh.conversion.dense import DenseModel
from moh.routing import router_class


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
        shared_heads = router_class(router).default_shared_heads(h, step=step)
    return [MoHConfig(h, shared_heads, k, router, routing_unit=unit, kv_heads=kv_heads) for k in active]
