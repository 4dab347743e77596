"""Pictures: head load as a heat map, and loss curves (extra `llm`, matplotlib). Each returns a figure; `save` writes it.

Colours are told apart in print and by colour-blind readers. No display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moh._extras import require
from moh.inspection.load import HeadLoad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's palette
_DASHES = ("-", "--", "-.", ":")


def plot_head_load(load: HeadLoad, *, title: str = "Head load") -> Figure:
    """Layers x heads, the share of tokens that activate each head; shared heads are marked S."""
    figure_module = require("matplotlib.figure", extra="llm")
    count, heads = load.load.shape
    height = max(4.4, 1.4 + 0.2 * count)  # at least the length of the colour bar's label
    figure: Figure = figure_module.Figure(figsize=(1.6 + 0.42 * heads, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load.load.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for layer, config in enumerate(load.layers):
        for head in config.shared_indices:
            axes.text(head, layer, "S", ha="center", va="center", fontsize=7, color="#333333")
    axes.set(
        xlabel="head", ylabel="layer", title=title, xticks=range(heads), yticks=range(0, count, max(1, count // 15))
    )
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("share of tokens that use the head (S: shared, always 1)")
    return figure


def plot_losses(curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str = "Training loss") -> Figure:
    """One line per name, each a list of (step, loss)."""
    figure_module = require("matplotlib.figure", extra="llm")
    figure: Figure = figure_module.Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, losses, _DASHES[index % 4], color=_COLOURS[index % 4], label=name, marker="o", markersize=2.5)
    axes.set(xlabel="optimiser step", ylabel="next-token loss (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the path's suffix (.png, .svg), whole or not at all."""
    path = Path(path)
    scratch = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(scratch, dpi=150)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
