"""What the loads of groups say: how evenly they spread, how far groups are apart, which heads are dead or overloaded.

Of routed heads alone: shared heads and dense layers are used by every token of every group. Whether differences are more
than chance is the question of `permutation`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moh.inspection.use import HeadUse, Row


def load_entropy(load: Tensor) -> Tensor:
    """Entropy, in bits, of loads `[..., h_r]` taken as a distribution over the heads, `[...]` float64.

    `log2(h_r)` where all heads are used alike; 0 where all tokens use the same single one.
    """
    nats: Tensor = torch.special.entr(_distribution(load)).sum(-1)
    return nats / math.log(2)


def load_distance(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon distance, base 2, between loads `[..., h_r]` taken as distributions over the heads, `[...]` float64.

    0 where both are the same, 1 where no head is used by both. The square root of the divergence.
    """
    p, q = _distribution(a), _distribution(b)
    divergence = load_entropy((p + q) / 2) - (load_entropy(p) + load_entropy(q)) / 2
    return divergence.clamp_min(0).sqrt()


def layer_rows(use: HeadUse) -> list[Row]:
    """One row per group with inputs and layer.

    Columns: group, inputs, layer, tokens, share (of heads that a token uses), routed_heads, entropy (of the routed heads'
    load, bits; NaN without routed heads), evenness (entropy over its maximum; NaN with less than two routed heads),
    shared_contribution (shared heads' part of the sum of contributions; NaN in a dense layer).
    """
    rows: list[Row] = []
    for group, name in enumerate(use.groups):
        if not use.inputs[group]:
            continue
        for place, layer in enumerate(use.layers):
            routed = layer.routed if layer.config is not None and layer.config.active_heads else []
            entropy = float(load_entropy(use.load[place][group, routed])) if routed else math.nan
            contribution = use.contribution[place][group]
            shared = math.nan
            if layer.config is not None:
                shared = float(contribution[list(layer.config.shared_indices)].sum() / contribution.sum())
            rows.append({
                "group": name,
                "inputs": int(use.inputs[group]),
                "layer": place,
                "tokens": int(use.tokens[group, place]),
                "share": float(use.load[place][group].mean()),
                "routed_heads": len(routed),
                "entropy": entropy,
                "evenness": entropy / math.log2(len(routed)) if len(routed) > 1 else math.nan,
                "shared_contribution": shared,
            })  # fmt: skip
    return rows


def distance_rows(use: HeadUse) -> list[Row]:
    """One row per routed layer and pair of groups with inputs: layer, group, other, distance (`load_distance`)."""
    present = [group for group in range(len(use.groups)) if use.inputs[group]]
    return [
        {
            "layer": place,
            "group": use.groups[a],
            "other": use.groups[b],
            "distance": float(load_distance(use.load[place][a, routed], use.load[place][b, routed])),
        }
        for place, routed in choosing_layers(use)
        for number, a in enumerate(present)
        for b in present[number + 1 :]
    ]


def unusual_heads(use: HeadUse, *, dead: float = 0.01, overloaded: float = 0.95) -> list[Row]:
    """Routed heads that no group uses, or that every group uses nearly always, where tokens have a choice.

    Args:
        use: of the groups that are asked about.
        dead: a head is dead if fewer than this share of every group's tokens activate it.
        overloaded: a head is overloaded if more than this share of every group's tokens activate it.

    Returns:
        layer, head, what ("dead" or "overloaded"), lowest and highest load among the groups.

    Raises:
        ValueError: the thresholds are not `0 <= dead < overloaded <= 1`.
    """
    if not 0 <= dead < overloaded <= 1:
        raise ValueError(f"0 <= dead < overloaded <= 1 must hold, got dead = {dead} and overloaded = {overloaded}")
    rows: list[Row] = []
    for place, routed in choosing_layers(use):
        load = use.load[place][use.inputs > 0]
        for head in routed:
            low, high = float(load[:, head].min()), float(load[:, head].max())
            what = "dead" if high < dead else "overloaded" if low > overloaded else None
            if what is not None:
                rows.append({"layer": place, "head": head, "what": what, "lowest": low, "highest": high})
    return rows


def choosing_layers(use: HeadUse) -> list[tuple[int, list[int]]]:
    """The layers in which tokens have a choice, some but not all routed heads being active: (place, routed heads)."""
    return [
        (place, layer.routed)
        for place, layer in enumerate(use.layers)
        if layer.config is not None and 0 < layer.config.active_heads < layer.config.num_routed
    ]


def _distribution(load: Tensor) -> Tensor:
    load = load.double()
    return load / load.sum(-1, keepdim=True)
