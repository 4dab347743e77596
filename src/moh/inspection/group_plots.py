"""Pictures of how groups of inputs use heads: loads and scores per group (the paper's figures), shared against
routed heads, distances between groups, and what each head is worth.

Needs the extra `plot` (matplotlib); `plots` saves them, with the rows that they show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moh._extras import require
from moh.inspection.ablation import HeadAblation
from moh.inspection.groups import HeadUse, LayerHeads
from moh.inspection.plots import COLOURS, new_figure
from moh.inspection.statistics import choosing_layers, load_distance
from moh.inspection.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_GROUPS = 12
"""By default at most this many groups are shown: those furthest from the mean load."""
MAX_LAYERS = 12
"""By default at most this many layers are shown, evenly spread."""
_CELL, _WIDEST = 0.24, 2.6  # inches: width of a head, and the most of a panel
_BAR = {
    "load": ("share of tokens that use the head", "share of tokens"),
    "gate": ("routing score, mean over tokens", "routing score"),
}
_PAGE = 12.0  # inches, of all panels of a row together


def plot_group_load(
    use: HeadUse,
    *,
    quantity: Literal["load", "gate"] = "load",
    groups: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """One panel per layer: the share of each group's tokens that use each head, or its score; shared heads are marked S.

    Args:
        use: from `moh.inspection.inspect_groups`.
        quantity: "load", or "gate": the mean routing score, 0 counting where a head is inactive.
        groups: names to show; None shows all, or the `MAX_GROUPS` most distinctive if there are more.
        layers: layers to show; None shows those in which tokens choose (elsewhere every load is 1), or `MAX_LAYERS` of
            them, evenly spread.
        title: of the figure; None describes what is shown.

    Raises:
        ValueError: a group or a layer is unknown.
    """
    total = len(use.groups)
    chosen = tuple(groups) if groups is not None else use.groups
    if groups is None and total > MAX_GROUPS:
        chosen = use.distinctive(MAX_GROUPS)
    shown = use.select(chosen)
    places = _layers(use, layers)
    width = min(_WIDEST, _CELL * max(4, *(use.layers[place].num_heads for place in places))) + 0.35
    rows = math.ceil(len(places) / max(1, int(_PAGE // width)))
    columns = math.ceil(len(places) / rows)
    labels = 0.085 * max(map(len, chosen))
    size = (max(5.0, labels + columns * width + 1.1), 1.0 + rows * (_CELL * len(chosen) + 0.62))
    figure = new_figure(*size)
    grid = figure.subplots(rows, columns, squeeze=False)
    values: list[Tensor] = getattr(shown, quantity)
    most = 1.0 if quantity == "load" else max(float(values[place].nan_to_num().max()) for place in places)
    image = None
    for panel, place in enumerate(places):
        axes = grid[panel // columns][panel % columns]
        image = axes.imshow(
            values[place].numpy(), cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"layer {place}", fontsize=9)
        _head_ticks(axes, use.layers[place])
        first = panel % columns == 0
        axes.set_yticks(range(len(chosen)), chosen if first else [""] * len(chosen), fontsize=8)
    for axes in grid.flat[len(places) :]:
        axes.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.015)
    long, short = _BAR[quantity]
    bar.set_label(long if size[1] > 2.6 else short, fontsize=9)
    some = f", {len(chosen)} of {total} groups" if len(chosen) < total else ""
    some += f", {len(places)} of {len(use.layers)} layers" if len(places) < len(use.layers) else ""
    dense = ", D: dense layer" if any(use.layers[place].config is None for place in places) else ""
    marks = f"(S: shared{', always 1' if quantity == 'load' else ''}{dense})"
    name = "Head load" if quantity == "load" else "Routing score"
    figure.suptitle(title if title is not None else f"{name} per group{some} {marks}", fontsize=11)
    return figure


def _layers(use: HeadUse, asked: Sequence[int] | None) -> list[int]:
    if asked is None:
        choosing = [place for place, _ in choosing_layers(use)] or list(range(len(use.layers)))
        last, shown = len(choosing) - 1, min(MAX_LAYERS, len(choosing))
        return [choosing[round(i * last / max(1, shown - 1))] for i in range(shown)]
    for place in asked:
        if not 0 <= place < len(use.layers):
            raise ValueError(f"layers must be between 0 and {len(use.layers) - 1}, got {place}")
    if not asked:
        raise ValueError("layers must name at least one layer, got none")
    return list(asked)


def _head_ticks(axes: Any, layer: LayerHeads) -> None:
    """Mark shared heads S and those of a dense layer D; number routed heads, only every other one if there are many."""
    marks = {"shared": "S", "dense": "D"}
    step = 1 if layer.num_heads <= 12 else 4
    heads = range(layer.num_heads)
    labels = [marks.get(layer.kind(head)) or (str(head) if head % step == 0 else "") for head in heads]
    axes.set_xticks(heads, labels, fontsize=7)
    axes.tick_params(length=2)


_MARKS = {"shared": "s", "routed": "o", "dense": "D"}


def shared_and_routed_rows(use: HeadUse) -> list[Row]:
    """One row per layer and kind of head ("shared", "routed", "dense"), means over groups with inputs.

    Columns: layer, kind, heads, load (mean over the heads), contribution (mean of one head, over tokens that use it) and
    part (the kind's part of the layer's sum of contributions).
    """
    present = use.inputs > 0
    rows: list[Row] = []
    for place, layer in enumerate(use.layers):
        load, contribution = (x[place][present].mean(0) for x in (use.load, use.contribution))  # [H]
        for kind in _MARKS:
            heads = [head for head in range(layer.num_heads) if layer.kind(head) == kind]
            if not heads:
                continue
            rows.append({
                "layer": place,
                "kind": kind,
                "heads": len(heads),
                "load": float(load[heads].mean()),
                "contribution": float(contribution[heads].sum() / load[heads].sum()),
                "part": float(contribution[heads].sum() / contribution.sum()),
            })  # fmt: skip
    return rows


def plot_shared_and_routed(rows: Sequence[Row]) -> Figure:
    """Per layer: the contribution of an active head of each kind, and each kind's part of all contributions."""
    figure, (left, right) = _figure(columns=2, width=10.0, height=3.8)
    for number, (kind, mark) in enumerate(_MARKS.items()):
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        layers = [row["layer"] for row in own]
        style: dict[str, Any] = {"color": COLOURS[number], "marker": mark, "markersize": 4, "label": kind}
        left.plot(layers, [row["contribution"] for row in own], **style)
        right.plot(layers, [row["part"] for row in own], linestyle="--", **style)
    left.set(xlabel="layer", ylabel="contribution of one head", title="A head's contribution where it is active")
    right.set(xlabel="layer", ylabel="part of all contributions", title="Part of the layer's contributions")
    right.set_ylim(0, 1.03)
    for axes in (left, right):
        _finish(axes)
    return figure


def plot_distances(use: HeadUse, tests: Sequence[Row] = ()) -> Figure:
    """How far groups are apart: the distance of every two groups, mean over layers, and each layer's divergence.

    Args:
        use: at least two groups with inputs, and a layer in which tokens choose.
        tests: rows of `permutation_test`, for each layer's divergence and that expected by chance; without them the
            second panel is left out.

    Raises:
        ValueError: there are fewer than two groups with inputs, or no layer in which tokens choose.
    """
    names = [name for name, inputs in zip(use.groups, use.inputs.tolist(), strict=True) if inputs]
    layers = choosing_layers(use)
    if len(names) < 2 or not layers:
        raise ValueError("distances need at least two groups with inputs and a layer in which tokens choose")
    shown = use.select(names)
    distance = torch.stack(
        [
            load_distance(shown.load[place][:, None, routed], shown.load[place][None][:, :, routed])
            for place, routed in layers
        ]
    ).mean(0)  # [G, G]
    size = max(3.4, 1.8 + 0.42 * len(names))
    columns = 2 if tests else 1
    figure, panels = _figure(
        columns=columns, width=size + 1.2 + 5.2 * (columns - 1), height=size, ratios=[size, 5][:columns]
    )
    matrix = panels[0]
    image = matrix.imshow(distance.numpy(), cmap="cividis", vmin=0, interpolation="nearest")
    matrix.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    matrix.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 12:
        middle = float(distance.max()) / 2
        for a in range(len(names)):
            for b in range(len(names)):
                value = float(distance[a, b])
                colour = "white" if value < middle else "black"
                text = f"{value:.2f}".removeprefix("0") if a != b else ""
                matrix.text(b, a, text, ha="center", va="center", fontsize=7, color=colour)
    matrix.set_title("Jensen-Shannon distance of loads,\nmean over layers", fontsize=10)
    figure.colorbar(image, ax=matrix, shrink=0.8)
    if tests:
        _plot_tests(panels[1], tests)
    return figure


def plot_ablation(ablation: HeadAblation, *, title: str = "Loss without the head, minus loss") -> Figure:
    """Layers x heads: how much the loss rises without each head; a dot where it is beyond two standard errors."""
    increase = ablation.map()
    count, heads = increase.shape
    height = max(3.4, 1.4 + 0.2 * count)
    figure = new_figure(max(4.8, 2.0 + 0.42 * heads), height)
    axes = figure.subplots()
    # A few early heads are worth far more than all others: colours saturate here
    most = float(increase[~increase.isnan()].abs().quantile(0.98)) or 1e-12
    image = axes.imshow(increase.numpy(), cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    for layer, (means, errors) in enumerate(zip(ablation.increase, ablation.stderr, strict=True)):
        for head, (mean, error) in enumerate(zip(means.tolist(), errors.tolist(), strict=True)):
            if not math.isnan(error) and abs(mean) > 2 * error:
                axes.plot(head, layer, ".", color="white" if abs(mean) > 0.6 * most else "black", markersize=3)
    axes.set(
        xlabel="head", ylabel="layer", title=title, xticks=range(heads), yticks=range(0, count, max(1, count // 15))
    )
    axes.set_facecolor("#dddddd")
    bar = figure.colorbar(image, ax=axes, extend="both")
    bar.set_label("nats (dot: beyond two standard errors)" if height > 3.6 else "nats")
    return figure


def _plot_tests(axes: Any, tests: Sequence[Row]) -> None:
    own = [row for row in tests if row["layer"] != "all"]
    layers = [row["layer"] for row in own]
    axes.plot(layers, [row["divergence"] for row in own], "-o", color=COLOURS[0], markersize=4, label="groups")
    axes.plot(layers, [row["by_chance"] for row in own], "--", color=COLOURS[1], label="exchanged labels, mean")
    clear = [row for row in own if float(row["p_holm"]) <= 0.05]
    axes.plot(
        [row["layer"] for row in clear],
        [row["divergence"] for row in clear],
        "o",
        markersize=9,
        markerfacecolor="none",
        color="#000000",
        label="p ≤ 0.05 (Holm)",
    )
    axes.set(xlabel="layer", ylabel="divergence between groups (bits)", title="More than chance?")
    axes.margins(y=0.3)  # room for the legend
    axes.set_ylim(bottom=0)
    _finish(axes)


def _figure(*, columns: int, width: float, height: float, ratios: list[float] | None = None) -> tuple[Figure, Any]:
    figure = new_figure(width, height)
    return figure, figure.subplots(1, columns, squeeze=False, width_ratios=ratios)[0]


def _finish(axes: Any) -> None:
    axes.xaxis.set_major_locator(require("matplotlib.ticker", extra="plot").MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
