"""The page and the picture of `long_texts.py`."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from does_routing_pay_models import DROPPED_LINEAR, FIXED_HEADS, METHODS, MODELS, ROUTED, SHORT, about_blocks
from result_names import commands

from moh._extras import require
from moh._files import write_text
from moh.evaluation import perplexity_rise

NAME = "long_texts"
DENSE = "dense"
KINDS = ("positions", "needles")
SAME = {"positions": ("edges", "blocks"), "needles": ("haystacks", "texts", "depths")}
"""What the cells of one model must have in common to be on one page."""
DEFAULTS: dict[str, Any] = {
    "only": None,
    "model": next(iter(MODELS)),
    "shares": [7 / 9, 6 / 9, 5 / 9, 4 / 9],
    "methods": [ROUTED, SHORT, FIXED_HEADS, DROPPED_LINEAR],
    "texts": ("anarchism", "python-doc"),
    "lengths": (512, 1_024, 2_048, 4_096, 8_192),
    "haystacks": 12,
    "blocks": 4,
}
"""Defaults of the options that change results."""

_ORDER = (DENSE, *METHODS)
_FIELDS = {"chosen": "The right word is the likeliest of the five in the text (by chance 20 %)",
           "written": "The right word is what the model writes, greedily"}  # fmt: skip


def write(out: Path, images: Path, cells: list[dict[str, Any]]) -> None:
    """Write the page into `out` and the picture into `images`, from all cells that are there."""
    rounded = [
        {**cell, "aim": round(cell["aim"], 4), "share": round(cell["share"], 4)} for cell in cells
    ]  # of all calls
    cells = sorted(rounded, key=lambda cell: (-cell["aim"], _ORDER.index(cell["method"])))
    models = list(dict.fromkeys(cell["model"] for cell in cells if cell["method"] == DENSE))
    if not models:
        return
    lines = ["# Long texts", "", f"![perplexity by position and needles](../images/{NAME}.png)"]
    for model in models:
        of_model = [cell for cell in cells if cell["model"] == model]
        first = of_model[0]
        threads = " or ".join(str(count) for count in sorted({cell["threads"] for cell in of_model}))
        machine = f"{first['cpu']}, {threads} thread(s), torch {first['torch']}, float32"
        lines += [
            "",
            f"## {model}",
            "",
            f"No gradient step; {machine}. Calibrated {about_blocks(cell['method'] for cell in of_model)}. ± is the standard "
            "error of the paired difference to the dense model.",
        ]
        positions = [cell for cell in of_model if cell["kind"] == "positions"]
        rows = {(cell["aim"], cell["method"]): cell["share"] for cell in of_model}
        for text in dict.fromkeys(cell["text"] for cell in positions):
            lines += ["", *_positions([cell for cell in positions if cell["text"] == text], rows)]
        needles = [cell for cell in of_model if cell["kind"] == "needles"]
        lines += ["", *_needles(needles)] if needles else []
    lines += ["", "Made by:", "", "```console", *(f"$ {line}" for line in made_by(cells)), "```"]
    out.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{NAME}.md", "\n".join(lines) + "\n")
    _plot(images / f"{NAME}.png", models, cells)


def made_by(cells: list[dict[str, Any]]) -> list[str]:
    """The commands that measured the cells."""
    found: list[str] = []
    for kind in KINDS:
        calls = []
        for cell in cells:
            if cell["kind"] != kind or cell["method"] == DENSE:  # every command measures the dense model too
                continue
            call = {"only": kind, "model": cell["model"], "shares": [cell["aim"]], "methods": [cell["method"]]}
            if kind == "positions":
                call |= {"texts": [cell["text"]], "lengths": tuple(cell["edges"][1:]), "blocks": cell["blocks"]}
            else:
                call |= {"texts": tuple(cell["texts"]), "lengths": [cell["length"]], "haystacks": cell["haystacks"]}
            calls.append(call)
        joined = "texts" if kind == "positions" else "lengths"
        defaults = {name: value for name, value in DEFAULTS.items() if not calls or name in calls[0]}
        found += commands(f"{NAME}.py", calls, defaults | {joined: [*DEFAULTS[joined]]})
    return [*found, f"python experiments/{NAME}.py --only page"]


def _positions(cells: list[dict[str, Any]], rows: dict[tuple[float, str], float]) -> list[str]:
    """The table of one text; `rows` are the (aim, method) -> share of all models that the page is about."""
    dense = next(cell for cell in cells if cell["method"] == DENSE)
    ranges = [f"{first:,}–{last:,}" for first, last in pairwise(dense["edges"])]
    lines = [
        f"Perplexity by position, {len(dense['losses'])} blocks of held-out {dense['text']}: the dense model's, and how far the "
        "others are above it in percent. The share of routed heads is the average over the text of their calibration.",
        "",
        "| share of heads | method | " + " | ".join(ranges) + " |",
        "| --- | --- |" + " --- |" * len(ranges),
    ]
    of = {(cell["aim"], cell["method"]): cell for cell in cells}
    for (aim, method), share in rows.items():
        cell = of.get((aim, method))
        if cell is None:
            values = ["not measured"] * len(ranges)
        elif cell is dense:
            values = [f"{value:.2f}" for value in _perplexities(cell)]
        else:
            values = [f"{rise:+.1f} ± {error:.1f}" for rise, error in _rises(cell, dense)]
        lines.append("| " + " | ".join([f"{share:.0%}", method, *values]) + " |")
    return lines


def _perplexities(cell: dict[str, Any]) -> list[float]:
    return [math.exp(fmean(losses)) for losses in zip(*cell["losses"], strict=True)]


def _rises(cell: dict[str, Any], dense: dict[str, Any]) -> list[tuple[float, float]]:
    """(percent, its standard error) for each range of positions."""
    if cell["edges"] != dense["edges"] or len(cell["losses"]) != len(dense["losses"]):
        raise ValueError(
            f"{cell['method']} and {DENSE} read other blocks of {cell['text']}: remove their cells and run again"
        )
    ranges = zip(zip(*cell["losses"], strict=True), zip(*dense["losses"], strict=True), strict=True)
    return [perplexity_rise(ours, theirs) for ours, theirs in ranges]


def _needles(cells: list[dict[str, Any]]) -> list[str]:
    models: dict[tuple[float, str, float], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        models.setdefault((cell["aim"], cell["method"], cell["share"]), {})[cell["length"]] = cell
    dense = models[1.0, DENSE, 1.0]
    lengths, depths = sorted(dense), cells[0]["depths"]
    shared = sorted(set.intersection(*(set(row) for row in models.values())))
    if not shared and (several := [set(row) for row in models.values() if len(row) > 1]):
        shared = sorted(set.intersection(*several))  # a row of one length takes no columns from the others
    by_depth = f" of {' and '.join(f'{n:,}' for n in shared)} tokens, which all have read," if shared else ""
    lines = [
        f"Needles in held-out {' and '.join(cells[0]['texts'])}: {len(dense[lengths[0]]['answers'])} texts of each length with "
        f"{len(depths)} needles each, in percent of the questions; in brackets the difference to the dense model in points. "
        + (f"The last columns are by the needle's depth in the texts{by_depth} together." if shared else "")
    ]
    for field, title in _FIELDS.items():
        titles = [*(f"{n:,}" for n in lengths), *(f"depth {depth:.0%}" for depth in depths if shared)]
        lines += ["", f"{title}:", "", "| share of heads | method | " + " | ".join(titles) + " |",
                  "| --- | --- |" + " --- |" * len(titles)]  # fmt: skip
        for (_, method, share), row in models.items():
            values = [_of_length(row.get(n), dense[n], field) for n in lengths]
            rows = [answers[field] for n in shared if row.keys() >= set(shared) for answers in row[n]["answers"]]
            by_depths = [f"{100 * fmean(column):.0f}" for column in zip(*rows, strict=True)]
            values += by_depths or [""] * (len(depths) if shared else 0)
            lines.append("| " + " | ".join([f"{share:.0%}", method, *values]) + " |")
    return lines


def _of_length(cell: dict[str, Any] | None, dense: dict[str, Any], field: str) -> str:
    """Percent of the questions, and behind it the difference to the dense model; "not measured" where there is no cell."""
    if cell is None:
        return "not measured"
    found = f"{100 * retrieval(cell, field):.0f}"
    return found if cell is dense else "{} ({:+.1f} ± {:.1f})".format(found, *difference(cell, dense, field))


def retrieval(cell: dict[str, Any], field: str) -> float:
    """Share of a cell's questions that are answered rightly."""
    return fmean(fmean(answers[field]) for answers in cell["answers"])


def difference(cell: dict[str, Any], dense: dict[str, Any], field: str) -> tuple[float, float]:
    """Points by which a model is above the dense one at one length, and the standard error.

    The questions of one text are not independent, so the spread is that between texts.

    Raises:
        ValueError: the two have read other numbers of texts.
    """
    ours, theirs = cell["answers"], dense["answers"]
    if len(ours) != len(theirs):
        raise ValueError(
            f"the models read {len(ours)} and {len(theirs)} texts of {cell['length']} tokens: remove their cells and run again"
        )
    deltas = [100 * (fmean(a[field]) - fmean(b[field])) for a, b in zip(ours, theirs, strict=True)]
    return fmean(deltas), stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else math.nan


def _plot(file: Path, models: list[str], cells: list[dict[str, Any]]) -> None:
    """For each model: above, the rise of the perplexity by position, the mean over the texts; below, needles by length."""
    figure = require("matplotlib.figure", extra="llm").Figure
    aims = sorted({cell["aim"] for cell in cells if cell["method"] != DENSE}, reverse=True) or [1.0]
    picture = figure(figsize=(max(7.0, 3.4 * len(aims)), 5.6 * len(models)), layout="constrained")
    axes = picture.subplots(2 * len(models), len(aims), squeeze=False, sharex="row", sharey="row")
    for number, model in enumerate(models):
        of_model = [cell for cell in cells if cell["model"] == model]
        ticks = sorted({n for c in of_model for n in (c["edges"][1:] if c["kind"] == "positions" else [c["length"]])})
        dense = {cell.get("text"): cell for cell in of_model if cell["method"] == DENSE}
        for aim, above, below in zip(aims, axes[2 * number], axes[2 * number + 1], strict=True):
            for method in _ORDER:
                mine = [c for c in of_model if c["method"] == method and c["aim"] in (aim, 1.0)]
                colour = "black" if method == DENSE else f"C{METHODS.index(method)}"
                rises = [_rises(c, dense[c["text"]]) for c in mine if c["kind"] == "positions" and method != DENSE]
                if rises:
                    ends = next(c["edges"][1:] for c in mine if c["kind"] == "positions")
                    means = [fmean(rise for rise, _ in column) for column in zip(*rises, strict=True)]
                    above.plot(ends, means, "o-", color=colour, markersize=3)
                points = sorted((c["length"], 100 * retrieval(c, "written")) for c in mine if c["kind"] == "needles")
                if points:
                    below.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=method)
            above.set(title=f"{model}, {aim:.0%} of the heads", xscale="log", yscale="symlog", xlabel="positions up to")
            below.set(xscale="log", ylim=(-3, 103), xlabel="length, tokens")
            for axis in (above, below):
                axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
                axis.minorticks_off()
                axis.grid(alpha=0.3)
        axes[2 * number][0].set_ylabel("perplexity above dense, %")
        axes[2 * number + 1][0].set_ylabel("needles found, %")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    scratch = file.with_name(f".{file.name}.partial.png")
    picture.savefig(scratch, dpi=110)
    scratch.replace(file)
