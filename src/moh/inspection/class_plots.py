"""The picture of head load per class: one heat map per layer, classes x heads (the paper's figure "head load per class").

Needs the extra `llm` (matplotlib); `moh.inspection.plots.save` writes the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh.config import MoHConfig
from moh.inspection.class_load import ClassHeadLoad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES = 12
"""So many classes are shown unless some are asked for: those whose loads differ most from the mean."""
MAX_LAYERS = 12
"""So many layers are shown unless some are asked for, evenly spread."""
_CELL, _WIDEST = 0.24, 2.6  # inches: of a head, of a panel
_PAGE = 12.0  # inches, of all panels of a row together


def plot_class_load(
    load: ClassHeadLoad,
    *,
    classes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """One panel per layer: the share of each class's tokens that use each head; shared heads are marked S.

    Args:
        load: as `moh.inspection.class_head_load` counts it.
        classes: names to show; None shows all, or the `MAX_CLASSES` most distinctive of more.
        layers: layers to show; None shows those that route (where all heads are shared every load is 1), or
            `MAX_LAYERS` of them, evenly spread.
        title: of the figure; None says what is shown.

    Raises:
        ValueError: a class or a layer is unknown.
    """
    figure_module = require("matplotlib.figure", extra="llm")
    total = len(load.classes)
    chosen = tuple(classes) if classes is not None else load.classes
    if classes is None and total > MAX_CLASSES:
        chosen = load.distinctive(MAX_CLASSES)
    if not chosen:
        raise ValueError("classes must name at least one class, got none")
    shown = load.select(chosen)
    places = _layers(load.layers, layers)
    width = min(_WIDEST, _CELL * max(4, *(load.layers[place].num_heads for place in places))) + 0.35
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
        _head_ticks(axes, load.layers[place])
        first = panel % columns == 0
        axes.set_yticks(range(len(chosen)), chosen if first else [""] * len(chosen), fontsize=8)
    for axes in grid.flat[len(places) :]:
        axes.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.015)
    bar.set_label("share of tokens that use the head", fontsize=9)
    some = f", {len(chosen)} of {total} classes" if len(chosen) < total else ""
    some += f", {len(places)} of {len(load.layers)} layers" if len(places) < len(load.layers) else ""
    figure.suptitle(title if title is not None else f"Head load per class{some} (S: shared, always 1)", fontsize=11)
    return figure


def _layers(configs: Sequence[MoHConfig], asked: Sequence[int] | None) -> list[int]:
    if asked is None:
        routing = [place for place, config in enumerate(configs) if config.active_heads] or list(range(len(configs)))
        last, shown = len(routing) - 1, min(MAX_LAYERS, len(routing))
        return [routing[round(i * last / max(1, shown - 1))] for i in range(shown)]
    for place in asked:
        if not 0 <= place < len(configs):
            raise ValueError(f"layers must be between 0 and {len(configs) - 1}, got {place}")
    if not asked:
        raise ValueError("layers must name at least one layer, got none")
    return list(asked)


def _head_ticks(axes: Any, config: MoHConfig) -> None:
    """Shared heads are marked S, routed ones numbered, every other one where there are many."""
    shared = set(config.shared_indices)
    step = 1 if config.num_heads <= 12 else 4
    labels = ["S" if head in shared else str(head) if head % step == 0 else "" for head in range(config.num_heads)]
    axes.set_xticks(range(config.num_heads), labels, fontsize=7)
    axes.tick_params(length=2)
