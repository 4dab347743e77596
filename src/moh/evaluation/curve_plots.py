"""Pictures of a trade-off curve (`moh.evaluation.curve`): quality above, speed below, share of heads along both.

Needs matplotlib (extra `plot`), but no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh.evaluation.curve import Curve, Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's, safe for colour-blind readers
_REFERENCE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}


def plot_curve(curve: Curve, *, title: str = "Quality and speed against the share of heads") -> Figure:
    """Perplexity or accuracy, and speed, against the share of heads in per cent; the dense model is a horizontal line.

    Speed is relative to the dense model if it was measured, else to the largest share.
    """
    figure_module = require("matplotlib.figure", extra="plot")
    points, dense = curve.points, curve.dense
    text = points[0].perplexity is not None
    timed = points[0].images is not None or points[0].prefill is not None
    figure: Figure = figure_module.Figure(figsize=(6.4, 6.4 if timed else 3.6), layout="constrained")
    axes = figure.subplots(2 if timed else 1, sharex=True, squeeze=False)[:, 0]
    shares = [100 * p.share for p in points]
    quality = axes[0]
    if text:
        quality.plot(shares, [p.perplexity for p in points], "o-", color=_BLUE)
        quality.set(ylabel="perplexity", yscale="log")
    else:
        quality.plot(shares, [p.top1 for p in points], "o-", color=_BLUE)
        quality.set(ylabel="top-1 accuracy (%)")
    quality.set(title=title)
    if dense is not None:
        value = dense.perplexity if text else dense.top1
        assert value is not None
        quality.axhline(value, **_REFERENCE, label=f"dense model: {value:.2f}{'' if text else ' %'}")
        quality.legend()
    if timed:
        _plot_speed(axes[1], curve, shares)
    for axis in axes:
        axis.grid(alpha=0.3)
    if text:  # over a small range a logarithmic axis has no labels by default
        from matplotlib.ticker import ScalarFormatter

        for formatter in (quality.yaxis.set_major_formatter, quality.yaxis.set_minor_formatter):
            formatter(ScalarFormatter())
    axes[-1].set(xlabel="share of the heads that a token uses (%)")
    return figure


def _plot_speed(axis: Axes, curve: Curve, shares: Sequence[float]) -> None:
    points, dense = curve.points, curve.dense
    lines = (
        ("prefill", "o-", _ORANGE, [p.prefill for p in points], dense and dense.prefill),
        ("decoding", "s--", _GREEN, [p.decode for p in points], dense and dense.decode),
        ("images", "o-", _ORANGE, [_exact(p.images) for p in points], dense and _exact(dense.images)),
    )
    most = f"{shares[-1]:.0f} % of the heads"
    for name, style, colour, speeds, base in lines:
        found = [speed for speed in speeds if speed is not None]
        if not found:
            continue
        one = (base or found[-1]).median
        low = [(speed.median - speed.low) / one for speed in found]
        high = [(speed.high - speed.median) / one for speed in found]
        axis.errorbar(
            shares,
            [speed.median / one for speed in found],
            yerr=[low, high],
            fmt=style,
            color=colour,
            capsize=2,
            label=f"{name}: {one:,.0f} per second {'when dense' if base else f'at {most}'}",
        )
    if dense is not None:
        axis.axhline(1, **_REFERENCE)
    unit = "tokens/s" if points[0].images is None else "images/s"
    axis.set(ylabel=f"{unit}, relative to {most if dense is None else 'the dense model'}")
    axis.legend()


def _exact(rate: float | None) -> Speed | None:
    return None if rate is None else Speed(rate, rate, rate)
