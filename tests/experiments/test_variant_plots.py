"""Figures that compare variants show every seed, and a variant in the same colour everywhere."""

from __future__ import annotations

from pathlib import Path

from variant_plots import plot_over_layers, plot_over_training, plot_scores

from moh.inspection.plots import save

SCORES = {"dense": [3.0, 5.0], "MoH, 75 %": [2.0, 2.5, 4.5]}


def test_every_seed_is_a_dot_and_the_mean_a_line(tmp_path: Path) -> None:
    figure = plot_scores(SCORES, quantity="perplexity", title="scores")
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == list(SCORES.values())
    assert [line.get_segments()[0][0][0] for line in axes.collections] == [4.0, 3.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SCORES)
    save(figure, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_the_line_over_the_layers_is_the_mean_of_the_seeds() -> None:
    curves = {"dense": [], "a": [[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]]}
    figure = plot_over_layers(curves, quantity="spread", title="layers", level=("best", 0.0))
    (axes,) = figure.axes
    assert list(axes.lines[0].get_ydata()) == [2.0, 2.0, 4.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "best"]


def test_a_variant_has_one_colour_in_both_figures() -> None:
    first = plot_scores({"dense": [1.0], "a": [2.0]}, quantity="x", title="t").axes[0].lines[1]
    second = plot_over_layers({"dense": [], "a": [[1.0, 2.0]]}, quantity="x", title="t").axes[0].lines[0]
    assert (first.get_color(), first.get_marker()) == (second.get_color(), second.get_marker())


def test_curves_over_training_are_means_of_the_seeds_at_the_same_places() -> None:
    curves = {"dense": [[(1, 4.0), (2, 3.0)], [(1, 6.0), (2, 1.0)]], "a": [[(1, 2.0), (2, 2.0)]]}
    (axes,) = plot_over_training(curves, quantity="loss", title="t", over="million tokens").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[5.0, 2.0], [2.0, 2.0]]
    assert list(axes.lines[0].get_xdata()) == [1, 2] and axes.get_xlabel() == "million tokens"


def test_errors_over_training_are_bars_around_the_values() -> None:
    curves, errors = {"a": [[(10, 4.0), (20, 3.0)]]}, {"a": [0.5, float("nan")]}
    (axes,) = plot_over_training(curves, quantity="score", title="t", over="step", errors=errors).axes
    (bars,) = axes.containers[0].lines[2]
    (first, _) = bars.get_segments()
    assert first.tolist() == [[10, 3.5], [10, 4.5]]
