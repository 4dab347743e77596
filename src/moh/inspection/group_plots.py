"""The picture of head load per group: one heat map per layer, groups x heads (the paper's figure "head load per class").

Needs the extra `llm` (matplotlib); `moh.inspection.plots.save` writes the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh.inspection.statistics import choosing_layers
from moh.inspection.use import HeadUse, LayerHeads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_GROUPS = 12
"""So many groups are shown unless some are asked for: those whose loads differ most from the mean."""
MAX_LAYERS = 12
"""So many layers are shown unless some are asked for, evenly spread."""
_CELL, _WIDEST = 0.24, 2.6  # inches: of a head, of a panel
_PAGE = 12.0  # inches, of all panels of a row together


def plot_group_load(
    use: HeadUse,
    *,
    groups: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """One panel per layer: the share of each group's tokens that use each head; shared heads are marked S.

    Args:
        use: as `moh.inspection.inspect_groups` counts it.
        groups: names to show; None shows all, or the `MAX_GROUPS` most distinctive of more.
        layers: layers to show; None shows those in which tokens choose (elsewhere every load is 1), or `MAX_LAYERS` of
            them, evenly spread.
        title: of the figure; None says what is shown.

    Raises:
        ValueError: a group or a layer is unknown.
    """
    figure_module = require("matplotlib.figure", extra="llm")
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
    figure: Figure = figure_module.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for panel, place in enumerate(places):
        axes = grid[panel // columns][panel % columns]
        image = axes.imshow(
            shown.load[place].numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"layer {place}", fontsize=9)
        _head_ticks(axes, use.layers[place])
        first = panel % columns == 0
        axes.set_yticks(range(len(chosen)), chosen if first else [""] * len(chosen), fontsize=8)
    for axes in grid.flat[len(places) :]:
        axes.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.015)
    bar.set_label("share of tokens that use the head" if size[1] > 2.6 else "share of tokens", fontsize=9)
    some = f", {len(chosen)} of {total} groups" if len(chosen) < total else ""
    some += f", {len(places)} of {len(use.layers)} layers" if len(places) < len(use.layers) else ""
    dense = ", D: dense layer" if any(use.layers[place].config is None for place in places) else ""
    marks = f"(S: shared, always 1{dense})"
    figure.suptitle(title if title is not None else f"Head load per group{some} {marks}", fontsize=11)
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
    """Shared heads are marked S, those of a dense layer D, routed ones numbered, every other one where there are many."""
    marks = {"shared": "S", "dense": "D"}
    step = 1 if layer.num_heads <= 12 else 4
    heads = range(layer.num_heads)
    labels = [marks.get(layer.kind(head)) or (str(head) if head % step == 0 else "") for head in heads]
    axes.set_xticks(heads, labels, fontsize=7)
    axes.tick_params(length=2)
