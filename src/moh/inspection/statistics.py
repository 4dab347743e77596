"""Statistics of groups' loads: how evenly they spread, how far groups are apart, which heads are dead or overloaded, and
whether groups differ by more than chance.

Only routed heads count: every token of every group uses shared heads and dense layers. The permutation tests exchange
labels between inputs (texts, images), never between tokens: tokens of one text are alike, and treating them as
independent would find differences between any two texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from moh.inspection.groups import HeadUse
from moh.inspection.tables import Row


def load_entropy(load: Tensor) -> Tensor:
    """Entropy, in bits, of loads `[..., h_r]` taken as a distribution over the heads, `[...]` float64.

    `log2(h_r)` if all heads are used equally; 0 if all tokens use the same single head, or none.
    """
    nats: Tensor = torch.special.entr(_distribution(load)).sum(-1)
    return nats / math.log(2)


def load_distance(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon distance, base 2, between loads `[..., h_r]` taken as distributions over the heads, `[...]` float64.

    The square root of the divergence: 0 if both are the same, 1 if no head is used by both, as where one uses none at all.
    """
    p, q = _distribution(a), _distribution(b)
    divergence = load_entropy((p + q) / 2) - (load_entropy(p) + load_entropy(q)) / 2
    return divergence.clamp_min(0).sqrt()


def layer_rows(use: HeadUse) -> list[Row]:
    """One row per group with inputs and layer.

    Columns: group, inputs, layer, tokens, share (of heads that a token uses), routed_heads, entropy (of the routed heads'
    load, bits; NaN without routed heads), evenness (entropy over its maximum; NaN with fewer than two routed heads),
    shared_contribution (shared heads' part of the sum of contributions; NaN in a dense layer, and where no head contributes).
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
    """One row per layer with a choice and two groups with inputs: layer, group, other, distance (`load_distance`)."""
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
    """Routed heads that no group uses, or that every group uses nearly always, in layers with a choice.

    Args:
        use: the groups.
        dead: a head is dead if less than this share of every group's tokens activates it.
        overloaded: a head is overloaded if more than this share of every group's tokens activates it.

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
    """(place, routed heads) of each layer in which tokens have a choice: some but not all routed heads are active."""
    return [
        (place, layer.routed)
        for place, layer in enumerate(use.layers)
        if layer.config is not None and 0 < layer.config.active_heads < layer.config.num_routed
    ]


def _distribution(load: Tensor) -> Tensor:
    """Over the heads and, as the last entry, no head: a router with a threshold may have used none. NaN stays NaN."""
    load = load.double()
    total = load.sum(-1, keepdim=True)
    none = total == 0
    return torch.cat([load / total.where(~none, 1.0), none.double()], dim=-1)


def permutation_test(use: HeadUse, *, permutations: int = 999, seed: int = 0) -> list[Row]:
    """Do the groups differ? One test per layer in which tokens choose, and one over all of them.

    The statistic of a layer is the Jensen-Shannon divergence of the groups' loads over its routed heads, in bits, each
    group weighted by its active tokens: 0 if all are the same. The statistic over all layers is their mean. It is
    compared with the same inputs under exchanged labels: `p = (1 + number at least as large) / (1 + permutations)`.
    Uses `use.sample`, up to `keep` inputs of each group; memory does not grow with `permutations`.

    Args:
        use: at least two groups with inputs, one of them with at least two.
        permutations: at least 1; the smallest possible p is `1 / (1 + permutations)`.
        seed: seed of the exchanges.

    Returns:
        layer ("all" in the last row), divergence, by_chance (its mean under exchanged labels), p, and p_holm (adjusted over
        the layers by Holm's method; equal to p in the last row, which is one test).

    Raises:
        ValueError: `permutations` is below 1, there is no layer with a choice, fewer than two groups have inputs, or
            none has more than one.
    """
    layers, observed, counts = _prepare(use, permutations)
    sums, larger = torch.zeros_like(observed), torch.zeros_like(observed)
    for labels in _exchanged(use.sample.groups, permutations, seed):
        divergence = _divergences(counts, labels, len(use.groups))
        sums += divergence
        larger += divergence >= observed - 1e-12  # equal ones count too, despite rounding
    p = ((1 + larger) / (1 + permutations)).tolist()
    adjusted = [*holm(p[:-1]), p[-1]]
    names: list[int | str] = [*(place for place, _ in layers), "all"]
    by_chance = (sums / permutations).tolist()
    columns = zip(names, observed.tolist(), by_chance, p, adjusted, strict=True)
    return [
        {"layer": name, "divergence": divergence, "by_chance": chance, "p": own, "p_holm": of_all}
        for name, divergence, chance, own, of_all in columns
    ]


def pair_tests(use: HeadUse, *, permutations: int = 999, seed: int = 0) -> list[Row]:
    """Which groups differ? The test over all layers for every two groups with inputs.

    Args as in `permutation_test`.

    Returns:
        group, other, divergence, by_chance, p, p_holm (adjusted over these tests).

    Raises:
        ValueError: as in `permutation_test`, for any two groups.
    """
    present = [name for name, inputs in zip(use.groups, use.inputs.tolist(), strict=True) if inputs]
    rows: list[Row] = []
    for a, b in combinations(present, 2):
        overall = permutation_test(use.select([a, b]), permutations=permutations, seed=seed)[-1]
        rows.append({"group": a, "other": b, **{name: overall[name] for name in ("divergence", "by_chance", "p")}})
    for row, adjusted in zip(rows, holm([float(row["p"]) for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def specialised_heads(use: HeadUse, *, permutations: int = 999, seed: int = 0) -> list[Row]:
    """Which heads does a group use more, or less, than all others? Every routed head and group, tested together.

    The statistic is the group's load minus that of all other inputs, over its standard deviation under exchanged labels. p
    is adjusted for all heads and groups at once: the share of exchanges whose largest statistic is at least as large.

    Args as in `permutation_test`.

    Returns:
        by rising p, then by falling statistic: group, layer, head, load (of the kept inputs), elsewhere, difference, z, p.

    Raises:
        ValueError: as in `permutation_test`.
    """
    layers, _, _ = _prepare(use, permutations)
    sample, groups = use.sample, len(use.groups)
    active = torch.cat([sample.active[place][:, routed].double() for place, routed in layers], dim=1)  # [m, X]
    tokens = torch.cat([sample.tokens[:, [place] * len(routed)].double() for place, routed in layers], dim=1)
    observed, load, elsewhere = _against_others(active, tokens, sample.groups, groups)  # [G, X]
    squares = torch.zeros_like(observed)
    for labels in _exchanged(sample.groups, permutations, seed):
        squares += _against_others(active, tokens, labels, groups)[0].nan_to_num().square()
    spread = (squares / permutations).sqrt().clamp_min(1e-12)
    z = observed / spread
    larger = torch.zeros_like(z)
    for labels in _exchanged(sample.groups, permutations, seed):  # the same exchanges again, instead of storing them
        largest = (_against_others(active, tokens, labels, groups)[0].nan_to_num() / spread).abs().max()
        larger += largest >= z.abs() - 1e-12
    p = (1 + larger) / (1 + permutations)
    heads = [(place, head) for place, routed in layers for head in routed]
    rows: list[Row] = [
        {
            "group": use.groups[group],
            "layer": place,
            "head": head,
            "load": float(load[group, column]),
            "elsewhere": float(elsewhere[group, column]),
            "difference": float(observed[group, column]),
            "z": float(z[group, column]),
            "p": float(p[group, column]),
        }
        for group in sample.groups.unique().tolist()
        for column, (place, head) in enumerate(heads)
    ]
    return sorted(rows, key=lambda row: (row["p"], -abs(float(row["z"]))))


def score_variation(use: HeadUse, *, permutations: int = 999, seed: int = 0) -> list[Row]:
    """Do the routing scores of shared heads vary more between groups than those of routed heads?

    A head's score in a group is its mean gate there, 0 counting where it is inactive; its variation is the standard deviation
    over the groups divided by their mean, so that heads of large and of small gates compare. The statistic is the mean
    variation of a layer's shared heads minus that of its routed heads. It is compared with the same layer when any other of
    its heads are called shared: `p = (1 + number at least as large) / (1 + permutations)`. Layers whose gates are only 1 and 0
    have no scores of shared heads and are left out.

    Args:
        use: at least two groups with inputs.
        permutations: at least 1.
        seed: seed of the exchanges.

    Returns:
        layer ("all" in the last row: the mean of the layers, exchanged in each), shared, routed, difference, p, and p_holm
        (adjusted over the layers; equal to p in the last row). A small p is in favour of the shared heads; one near 1 means
        that routed heads vary more.

    Raises:
        ValueError: `permutations` is below 1, fewer than two groups have inputs, or no layer has scores of both kinds of heads.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    present = use.inputs > 0
    if present.sum() < 2:
        raise ValueError(f"at least 2 groups with inputs are needed, got {int(present.sum())}")
    layers: list[tuple[int, Tensor, Tensor]] = []  # place, variation [H], whether shared [H]
    for place, layer in enumerate(use.layers):
        if layer.config is None or not layer.has_scores or not layer.config.active_heads:
            continue
        gates = use.gate[place][present]  # [G, H]
        is_shared = torch.zeros(layer.num_heads, dtype=torch.bool)
        is_shared[list(layer.config.shared_indices)] = True
        if is_shared.any() and not is_shared.all():
            mean = gates.mean(0)  # 0: never used by any group, which is no variation
            layers.append((place, torch.where(mean > 0, gates.std(0) / mean, 0.0), is_shared))
    if not layers:
        raise ValueError("no layer has routing scores of shared and of routed heads: their variation can't be compared")

    def difference(variation: Tensor, chosen: Tensor) -> Tensor:
        return variation[chosen].mean() - variation[~chosen].mean()

    observed = torch.stack([difference(variation, chosen) for _, variation, chosen in layers])
    generator = torch.Generator().manual_seed(seed)
    larger = torch.zeros(len(layers) + 1)
    for _ in range(permutations):
        exchanged = torch.stack(
            [difference(v, chosen[torch.randperm(len(chosen), generator=generator)]) for _, v, chosen in layers]
        )
        larger[:-1] += exchanged >= observed - 1e-12
        larger[-1] += exchanged.mean() >= observed.mean() - 1e-12
    p = ((1 + larger) / (1 + permutations)).tolist()
    means = torch.tensor([[float(v[chosen].mean()), float(v[~chosen].mean())] for _, v, chosen in layers])
    names: list[int | str] = [*(place for place, _, _ in layers), "all"]
    columns = zip(names, [*means.tolist(), means.mean(0).tolist()], p, [*holm(p[:-1]), p[-1]], strict=True)
    return [
        {"layer": name, "shared": shared, "routed": routed, "difference": shared - routed, "p": own, "p_holm": of_all}
        for name, (shared, routed), own, of_all in columns
    ]


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's method, which bounds the chance of any false alarm among all of them."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def _prepare(use: HeadUse, permutations: int) -> tuple[list[tuple[int, list[int]]], Tensor, list[Tensor]]:
    """The layers, their statistics and the mean of these `[L + 1]`, and each layer's counts `[m, h_r]`.

    Raises:
        ValueError: as in `permutation_test`.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    layers = choosing_layers(use)
    if not layers:
        raise ValueError("groups can't differ in their heads: in no layer do tokens choose among routed heads")
    sizes = use.sample.groups.bincount(minlength=len(use.groups))
    if (sizes > 0).sum() < 2:
        raise ValueError(f"at least 2 groups with inputs are needed, got {int((sizes > 0).sum())}")
    if sizes.max() < 2:
        raise ValueError("each group has a single input (text or image): labels can't be exchanged; give more inputs")
    counts = [use.sample.active[place][:, routed].double() for place, routed in layers]
    return layers, _divergences(counts, use.sample.groups, len(use.groups)), counts


def _exchanged(groups: Tensor, permutations: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(permutations):
        yield groups[torch.randperm(len(groups), generator=generator)]


def _divergences(counts: list[Tensor], labels: Tensor, groups: int) -> Tensor:
    """Each layer's divergence between groups, and the mean of all, `[L + 1]`."""
    found = []
    for of_layer in counts:  # [m, h_r]
        sums = of_layer.new_zeros(groups, of_layer.shape[1]).index_add_(0, labels, of_layer)
        total = sums.sum()
        weight = sums.sum(1) / total.where(total > 0, 1.0)  # no routed head used by any: nothing differs
        within = (weight * load_entropy(sums)).sum()  # a group without inputs has weight 0
        found.append((load_entropy(sums.sum(0)) - within).clamp_min(0))
    return torch.stack([*found, torch.stack(found).mean()])


def _against_others(active: Tensor, tokens: Tensor, labels: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Load of each group minus that of all others, then both loads, each `[G, X]`."""
    ours, length = (x.new_zeros(groups, x.shape[1]).index_add_(0, labels, x) for x in (active, tokens))
    load, elsewhere = ours / length, (ours.sum(0) - ours) / (length.sum(0) - length)
    return load - elsewhere, load, elsewhere
