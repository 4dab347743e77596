"""The report of a conversion as a page: Markdown with its pictures, and one HTML file that holds them.

Needs matplotlib (extra `plot`), but no display.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh._files import REPORT, replacing_file, write_text
from moh.evaluation.conversion_report import AVERAGES, Cell, ConversionReport, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's, safe for colour-blind readers
_STYLE = (
    ":root{color-scheme:light dark;--text:#222;--back:#fff;--line:#ccc;--head:#f3f3f3}"
    "@media(prefers-color-scheme:dark){:root{--text:#e8eaee;--back:#14171c;--line:#363c47;--head:#242a33}}"
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--text);"
    "background:var(--back);overflow-wrap:break-word}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}td,th{border:1px solid var(--line);"
    "padding:.25rem .6rem;text-align:left}th,code{background:var(--head)}img{max-width:100%}code{padding:0 .2rem}"
    "div{overflow-x:auto}"
)


@dataclass(frozen=True)
class Heading:
    """A title of the page (level 1) or of one of its parts (level 2)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Table:
    """A table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture, `name` being the end of its file's name."""

    name: str
    about: str
    png: bytes


Part = str | Heading | Table | Picture
"""A part of a page; a text may hold `**bold**` and `` `code` ``."""


def save_report(report: ConversionReport, directory: Path) -> None:
    """Write `conversion_report.md`, `.html`, `.json` and the pictures of the first, each whole or not at all."""
    parts = list(page(report))
    for part in parts:
        if isinstance(part, Picture):
            with replacing_file(directory / _file(part)) as file:
                file.write_bytes(part.png)
    write_text(directory / f"{REPORT}.md", markdown(parts))
    write_text(directory / f"{REPORT}.html", as_html(parts))
    save_data(report, directory)


def save_data(report: ConversionReport, directory: Path) -> None:
    """Write `conversion_report.json` alone, whole or not at all."""
    write_text(directory / f"{REPORT}.json", json.dumps(report.as_dict(), indent=1) + "\n")


def page(report: ConversionReport) -> Iterator[Part]:
    """The parts of the page."""
    yield Heading(f"What converting {report.name} gives", 1)
    yield f"**Recommendation.** {report.recommendation()}"
    if not report.cells:
        return
    yield _of_this_model(report)
    yield Picture("curve", "perplexity and time against the share of heads", _png(plot_report(report)))
    yield Heading("Quality")
    yield (
        "Perplexity above the dense model's on held-out text, in percent, ± the standard error of the paired difference "
        'over blocks. The column "heads" is the share of all heads; where they are routed it is what the calibration\'s tokens '
        "used on average, and in parentheses is the average over the tokens of each text. Dense: "
        + ", ".join(f"{value:.2f} on {text}" for text, value in report.dense.items())
        + "."
    )
    yield _quality(report)
    if report.lengths:
        yield Heading("Time")
        yield (
            "Time relative to the dense model, in turns with it in the same process: the median over the rounds and, in "
            "parentheses, the quartiles. Models that lose more than four times what is tolerated are not timed."
        )
        yield _times(report)
    if report.counted:
        yield "Counted from the shapes, before any measuring: the part of the multiplications that routed heads save at most."
        shares = list(next(iter(report.counted.values())))
        yield Table(
            ("tokens", *(f"{share:.0%} of the heads" for share in shares)),
            [(f"{n:,}", *(f"{by_share[s]:.0%}" for s in shares)) for n, by_share in report.counted.items()],
        )
    yield Heading("Heads of each layer")
    yield Picture("heads", "heads of each layer", _png(plot_heads(report.ordered())))
    yield Heading("How it was measured")
    yield Table(("", ""), [(name, _value(value)) for name, value in report.measured.items()])
    yield (
        "All models were made from one calibration, without training; nothing that they were calibrated on was measured on. "
        "Time depends on the machine, on what else it does, and on the text."
    )


def _of_this_model(report: ConversionReport) -> str:
    cell = report.cells[0]
    rises = ", ".join(f"{rise.above:+.1f} ± {rise.stderr:.1f} % on {text}" for text, rise in cell.rises.items())
    share = f"{cell.share:.0%} of all heads{' on average' if cell.method in AVERAGES else ''}"
    return f"**The model in this directory**: {label(cell.method)}, {share}; perplexity {rises}."


def _quality(report: ConversionReport) -> Table:
    rows = []
    for cell in report.ordered():
        rises = [
            f"{rise.above:+.1f} ± {rise.stderr:.1f}" + (f" ({rise.share:.0%})" if cell.method in AVERAGES else "")
            for rise in cell.rises.values()
        ]
        mark = " (this model)" if cell is report.cells[0] else ""
        rows.append((label(cell.method) + mark, f"{cell.share:.0%}", *rises, f"{cell.cache:.0%}"))
    return Table(("", "heads", *report.dense, "cache"), rows)


def _times(report: ConversionReport) -> Table:
    lengths = report.lengths
    header = [f"{phase}, {n:,} tokens" for n in lengths for phase in ("prompt", "decoding")]
    rows = []
    for cell in report.ordered():
        if cell.times:
            ratios = [r for n in lengths for r in (cell.times[n].prefill, cell.times[n].decode)]
            figures = [f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios]
            rows.append((label(cell.method), f"{cell.share:.0%}", *figures))
    return Table(("", "heads", *header), rows)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_value(of_name)}" for name, of_name in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot_report(report: ConversionReport) -> Figure:
    """Rise of the perplexity, the mean over the texts, and time to read each prompt, against the share of heads."""
    panels = 1 + len(report.lengths)
    columns, rows = min(2, panels), -(-panels // 2)
    figure: Figure = require("matplotlib.figure", extra="plot").Figure(
        figsize=(4.6 * columns, 3.4 * rows), layout="constrained"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    quality, *times = axes[:panels]
    methods = dict.fromkeys(cell.method for cell in report.ordered())
    for colour, method in zip(_COLOURS, methods, strict=False):
        cells = [cell for cell in report.ordered() if cell.method == method]
        shares = [100 * cell.share for cell in cells]
        count = len(report.dense)
        rises = [sum(rise.above for rise in cell.rises.values()) / count for cell in cells]
        errors = [sum(rise.stderr**2 for rise in cell.rises.values()) ** 0.5 / count for cell in cells]
        style: dict[str, Any] = {"fmt": "o-", "color": colour, "markersize": 4, "capsize": 2, "label": label(method)}
        quality.errorbar(shares, rises, yerr=errors, **style)
        timed = [cell for cell in cells if cell.times]
        for axis, length in zip(times, report.lengths, strict=True):
            ratios = [cell.times[length].prefill for cell in timed]
            spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
            axis.errorbar([100 * c.share for c in timed], [r.median for r in ratios], yerr=spread, **style)
    quality.axhline(report.tolerated, color="black", linestyle=":", linewidth=1.2)
    quality.set(ylabel="perplexity above dense, %", yscale="symlog", title="quality")
    for axis, length in zip(times, report.lengths, strict=True):
        axis.axhline(1, color="black", linestyle=":", linewidth=1.2)
        axis.set(ylabel="time to dense", title=f"reading {length:,} tokens")
    for axis in (quality, *times):
        axis.set_xlabel("share of the heads, %")
        axis.grid(alpha=0.3)
    figure.legend(*quality.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), fontsize=8)
    return figure


def plot_heads(cells: Sequence[Cell]) -> Figure:
    """How many heads each layer of each model has."""
    layers = len(cells[0].used)
    figure: Figure = require("matplotlib.figure", extra="plot").Figure(
        figsize=(max(5.0, 2.4 + 0.28 * layers), 0.9 + 0.28 * len(cells)), layout="constrained"
    )
    axis = figure.subplots()
    most = max(max(cell.used) for cell in cells)
    axis.imshow([cell.used for cell in cells], aspect="auto", cmap="Blues", vmin=0, vmax=most)
    for row, cell in enumerate(cells):
        for layer, heads in enumerate(cell.used):
            colour = "white" if heads > 0.6 * most else "black"
            axis.text(layer, row, str(heads), ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(cells)), [f"{label(cell.method)}, {cell.share:.0%}" for cell in cells], fontsize=8)
    axis.set(xlabel="layer")
    return figure


def markdown(parts: Sequence[Part]) -> str:
    """The page as Markdown; pictures are files next to it."""
    lines = []
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Table):
            rows = [part.header, ["---"] * len(part.header), *part.rows]
            lines.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        elif isinstance(part, Picture):
            lines.append(f"![{part.about}]({_file(part)})")
        else:
            lines.append(part)
    return "\n\n".join(lines) + "\n"


def as_html(parts: Sequence[Part]) -> str:
    """The page as one HTML file without external addresses."""
    lines = []
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"<h{part.level}>{html.escape(part.text)}</h{part.level}>")
        elif isinstance(part, Table):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header) if any(part.header) else ""
            rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in part.rows]
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            lines.append(f"<div><table>{head and f'<tr>{head}</tr>'}{body}</table></div>")
        elif isinstance(part, Picture):
            data = base64.b64encode(part.png).decode()
            lines.append(f'<p><img alt="{html.escape(part.about)}" src="data:image/png;base64,{data}"></p>')
        else:
            text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(part))
            text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
            lines.append(f"<p>{text}</p>")
    title = next((part.text for part in parts if isinstance(part, Heading)), "")
    phone = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{phone}<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(lines) + "\n</body></html>\n"


def _file(picture: Picture) -> str:
    return f"{REPORT}_{picture.name}.png"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
