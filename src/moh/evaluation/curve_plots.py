"""Pictures of a trade-off curve (`moh.evaluation.curve`): quality above, speed below, share of heads along both.

No display is needed; needs matplotlib (extra `llm`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moh._extras import require
from moh.evaluation.curve import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's, told apart by colour-blind readers


def plot_curve(curve: Curve, *, title: str = "Quality and speed against the share of heads") -> Figure:
    """Perplexity or accuracy, and speed relative to the largest share, against the share of heads in per cent."""
    figure_module = require("matplotlib.figure", extra="llm")
    points = curve.points
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
    if timed and text:
        _relative(axes[1], shares, [(p.prefill.median, p.prefill.low, p.prefill.high) for p in points if p.prefill],
                  "o-", _ORANGE, "prefill")  # fmt: skip
        _relative(axes[1], shares, [(p.decode.median, p.decode.low, p.decode.high) for p in points if p.decode],
                  "s--", _GREEN, "decoding")  # fmt: skip
    elif timed:
        rates = [p.images for p in points if p.images is not None]
        _relative(axes[1], shares, [(rate, rate, rate) for rate in rates], "o-", _ORANGE, "images")
    if timed:
        unit = "tokens/s" if text else "images/s"
        axes[1].set(ylabel=f"{unit}, relative to {shares[-1]:.0f} % of the heads")
        axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    if text:  # a logarithmic axis without labels of its own where the range is small
        from matplotlib.ticker import ScalarFormatter

        for formatter in (quality.yaxis.set_major_formatter, quality.yaxis.set_minor_formatter):
            formatter(ScalarFormatter())
    axes[-1].set(xlabel="share of the heads that a token uses (%)")
    return figure


def _relative(
    axis: Axes, shares: list[float], rates: list[tuple[float, float, float]], style: str, colour: str, label: str
) -> None:
    """Medians with their quartiles, as multiples of the last median."""
    most = rates[-1][0]
    medians = [rate[0] / most for rate in rates]
    low = [(rate[0] - rate[1]) / most for rate in rates]
    high = [(rate[2] - rate[0]) / most for rate in rates]
    axis.errorbar(shares, medians, yerr=[low, high], fmt=style, color=colour, capsize=2,
                  label=f"{label}: {most:,.0f} per second at {shares[-1]:.0f} %")  # fmt: skip
