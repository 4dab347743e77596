"""Pictures that compare variants of a model: one figure of each per seed, and one of each per layer.

`moh.inspection.plots.save` writes the figure. Colours and marks as in `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito's palette
_MARKS = "os^Dv<>"


def plot_scores(scores: Mapping[str, Sequence[float]], *, quantity: str, title: str) -> Figure:
    """One row per variant: a dot for every seed, a line at their mean.

    Args:
        scores: name of the variant -> one number per seed.
        quantity: label of the axis.
        title: of the figure.
    """
    figure = Figure(figsize=(6.4, 1.3 + 0.42 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(scores.values()):
        colour = _COLOURS[row % len(_COLOURS)]
        axes.plot(values, [row] * len(values), _MARKS[row % len(_MARKS)], color=colour, alpha=0.75)
        axes.vlines(mean(values), row - 0.3, row + 0.3, color=colour, linewidth=2)
    axes.set(xlabel=quantity, title=title, yticks=range(len(scores)), yticklabels=list(scores))
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_over_layers(
    curves: Mapping[str, Sequence[Sequence[float]]],
    *,
    quantity: str,
    title: str,
    level: tuple[str, float] | None = None,
) -> Figure:
    """One line per variant over the layers, the mean of its seeds, in a band from the least to the largest of them.

    Args:
        curves: name of the variant -> for each seed, one number per layer. A variant without seeds is not drawn, but has
            its colour, so that the others have theirs in every figure.
        quantity: label of the vertical axis.
        title: of the figure.
        level: name and height of a level to draw, such as the best that is possible.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, seeds) in enumerate(curves.items()):
        if not seeds:
            continue
        colour, layers = _COLOURS[index % len(_COLOURS)], range(len(seeds[0]))
        by_layer = list(zip(*seeds, strict=True))
        axes.fill_between(
            layers, list(map(min, by_layer)), list(map(max, by_layer)), color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(layers, list(map(mean, by_layer)), f"-{_MARKS[index % len(_MARKS)]}", color=colour, label=name)
    if level is not None:
        axes.axhline(level[1], color="#666666", linestyle=":", label=level[0])
    axes.set(xlabel="layer", ylabel=quantity, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_over_training(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    quantity: str,
    title: str,
    over: str,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """One line per variant over the course of training, the mean of its seeds, in a band from the least to the largest.

    Args:
        curves: name of the variant -> for each seed, (place, value) by rising place, at the same places for all seeds.
        quantity: label of the vertical axis.
        title: of the figure.
        over: label of the horizontal axis: what places are.
        errors: name of the variant -> standard error at each place, drawn as bars; NaN for none.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (name, seeds) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [place for place, _ in seeds[0]]
        by_point = list(zip(*([value for _, value in seed] for seed in seeds), strict=True))
        axes.fill_between(
            places, list(map(min, by_point)), list(map(max, by_point)), color=colour, alpha=0.15, linewidth=0
        )
        mark = f"-{_MARKS[index % len(_MARKS)]}"
        bars = None if errors is None else errors[name]
        axes.errorbar(
            places, list(map(mean, by_point)), bars, fmt=mark, color=colour, label=name, markersize=4, capsize=3
        )
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.set(xlabel=over, ylabel=quantity, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
