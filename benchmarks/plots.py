"""Pictures of the results: time against the share of active heads, and against the sequence length; one row per CPU.

Colours are distinct in print and for colour-blind readers. No display is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import core, decode, layer
from benchmarks.cases import Case
from benchmarks.results import Result, Run
from moh.inspection.plots import save

STYLES = {
    "ours": ("#0072b2", "o", "-"),
    "ours (sdpa)": ("#009e73", "s", "--"),
    "ideal": ("#d55e00", "^", ":"),
    "masked": ("#cc79a7", "x", ""),
}
"""Colour (Okabe and Ito's palette), marker and dash of each contender."""

PANELS = {
    "forward": core.FORWARD,
    "forward + backward": core.BOTH,
    "decode, one token": decode.BASE,
    "whole layer": layer.BASE,
}

HIGHEST = 2.0
"""Largest ratio shown, so that a backend that is slow on short sequences does not flatten everything else."""

Draw = Callable[[Axes, Run, Case], bool]


def draw(runs: Sequence[Run], images: Path) -> list[tuple[str, Path]]:
    """Write the pictures that have results; returns (title, file) of each."""
    images.mkdir(parents=True, exist_ok=True)
    lengths = {
        f"{dtype}, {'causal' if causal else 'not causal'}": Case("core", "forward", dtype=dtype, causal=causal)
        for dtype in ("float32", "bfloat16")
        for causal in (False, True)
    }
    wanted: list[tuple[str, str, dict[str, Case], Draw]] = [
        ("Time against the share of active heads", "speed_share.png", PANELS, _by_share),
        ("Time against the sequence length", "speed_length.png", lengths, _by_length),
    ]
    written = []
    for title, name, panels, panel in wanted:
        figure = _figure(runs, panels, panel)
        if figure is not None:
            save(figure, images / name)
            written.append((title, images / name))
    return written


def _figure(runs: Sequence[Run], panels: dict[str, Case], draw_panel: Draw) -> Figure | None:
    """One row of panels per CPU, without empty columns."""
    scratch = Figure().subplots()
    columns = {name: case for name, case in panels.items() if any(draw_panel(scratch, run, case) for run in runs)}
    if not columns:
        return None
    figure = Figure(figsize=(1 + 3.3 * len(columns), 0.9 + 3.1 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), len(columns), squeeze=False, sharey="row")
    for line, run in zip(grid, runs, strict=True):
        for axes, (name, case) in zip(line, columns.items(), strict=True):
            draw_panel(axes, run, case)
            axes.set_title(f"{name}\n{_sizes(case) if draw_panel is _by_share else ''}".strip(), fontsize=9)
            axes.set_ylim(0, min(axes.get_ylim()[1], HIGHEST))
            axes.grid(alpha=0.3)
        line[0].set_ylabel(f"{fill(run.machine.cpu, 30)}\n{run.machine.threads} threads\ntime / dense", fontsize=8)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure


def _sizes(case: Case) -> str:
    return case.label.removeprefix("B1 ")


def _by_share(axes: Axes, run: Run, case: Case) -> bool:
    result = next((r for r in run.results if r.case.key == case.key and r.rows), None)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="y = a: in proportion to the heads")
    axes.axhline(1, color="grey", linewidth=0.8, label="dense")
    if result is not None:
        for name in STYLES:
            _line(
                axes, name, [(r.actual, r.ratio, r.ratio_low, r.ratio_high) for r in result.rows if r.contender == name]
            )
    axes.set_xlabel("share of active heads", fontsize=9)
    axes.set_xlim(0, 1.03)
    return result is not None


def _by_length(axes: Axes, run: Run, case: Case) -> bool:
    found = sorted((r for r in run.results if r.rows and _same_but_length(r, case)), key=lambda r: r.case.length)
    axes.axhline(1, color="grey", linewidth=0.8, label="dense")
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--", label="half")
    for name in ("ours", "ours (sdpa)", "ideal"):
        points = [(q.case.length, r) for q in found if (r := q.row(name, 0.5)) is not None]
        _line(
            axes, name, [(n, r.ratio, r.ratio_low, r.ratio_high) for n, r in points], label=f"{name}, half of the heads"
        )
    points = [(q.case.length, r) for q in found if (r := q.row("ours", 1.0)) is not None]
    axes.plot([n for n, _ in points], [r.ratio for _, r in points], "o-", color="#56b4e9", label="ours, all heads")
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return len(found) > 1


def _same_but_length(result: Result, case: Case) -> bool:
    c = result.case
    same = ("subject", "mode", "batch", "heads", "kv_heads", "width", "dtype", "causal")
    return all(getattr(c, name) == getattr(case, name) for name in same)


def _line(axes: Axes, name: str, points: list[tuple[float | None, float, float, float]], label: str = "") -> None:
    if not points:
        return
    colour, marker, dash = STYLES[name]
    x, y, low, high = zip(*sorted(points), strict=True)
    # A quartile may equal the median, and rounding may put it just past it
    errors = [
        [max(b - a, 0) for a, b in zip(low, y, strict=True)],
        [max(b - a, 0) for a, b in zip(y, high, strict=True)],
    ]
    axes.errorbar(
        x, y, errors, color=colour, marker=marker, linestyle=dash, markersize=4, capsize=2, label=label or name
    )
