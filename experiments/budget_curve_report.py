"""The page and the picture of `budget_curve.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from budget_curve_models import ROUTERS, UNITS

from moh._extras import require
from moh._files import write_text

_COLOURS = {"head": "#0072b2", "group_balanced": "#d55e00", "kv_group": "#009e73"}  # Okabe and Ito's
_STYLES = dict(zip(ROUTERS, (":", "-.", "--", "-"), strict=True))


def write(out: Path, images: Path, result: dict[str, Any]) -> None:
    """Write `budget_curve.json`, `.md` and `.png`."""
    out.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    write_text(out / "budget_curve.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "budget_curve.md", "\n".join(_page(result)) + "\n")
    _plot(images / "budget_curve.png", result)


def _page(result: dict[str, Any]) -> list[str]:
    about, rows, timed = result["about"], _ordered(result), result["timed"]
    texts = list(about["heldout_tokens"])
    lines = [
        "# Perplexity and time against the share of heads",
        "",
        "![Perplexity and time against the share of heads](../images/budget_curve.png)",
        "",
        f"{about['base']}, weights untouched except W_O where marked refitted: no gradient step. Calibrated on "
        f"{about['calibration_tokens']:,} tokens, half from each text. Held-out perplexity, and how far it is above the "
        "dense model's (± standard error of the paired difference over blocks of 512 tokens; one run). Held-out tokens: "
        + ", ".join(f"{name} {count:,}" for name, count in about["heldout_tokens"].items())
        + ". Shared heads, rounded down to what the unit allows: 2 in 9, those that contribute most; for query norms the first "
        "half of those in use. [The method](../method.md) describes the units.",
        "",
    ]
    if timed:
        lines += [
            f"Time per token relative to the dense model's, median of {timed['repeats']} rounds in which the models took "
            f"turns: prefill of {timed['prompt_tokens']} tokens, {timed['decode_tokens']} tokens decoded after it, batch 1, "
            f"float32, {timed['cpu']}, {timed['threads']} thread(s). "
            + ", ".join(f"Dense {name} {rows[0][name]['ms']:.2f} ms" for name in ("prefill", "decode"))
            + " per token. Attention itself is a small part of the time at this length. The time depends on the unit and the "
            f"number of heads and hardly on the router: {ROUTERS[-1]} is timed throughout, query norms once.",
            "",
        ]
    lines += [
        "| heads per layer | a token chooses | router | " + " | ".join(texts) + " | prefill | decode |",
        "| --- | --- | --- |" + " --- |" * (len(texts) + 2),
    ]
    for row in rows:
        name = [row.get("heads", "all"), row.get("unit", "-"), row.get("router", "dense")]
        cells = [_quality(row.get("texts", {}).get(text)) for text in texts]
        cells += [f"{row[kind]['to_dense']:.2f}" if kind in row else "" for kind in ("prefill", "decode")]
        lines.append("| " + " | ".join(map(str, [*name, *cells])) + " |")
    tuned = result["tuned"]
    if tuned:
        lines += [
            "",
            f"Before and after {tuned['steps']} steps of {tuned['tokens_per_step']:,} tokens of both texts (AdamW, 1e-4 with "
            f"warm-up and decay, the router frozen), {tuned['heads']} heads per layer on average, {ROUTERS[-1]}:",
            "",
            "| a token chooses | " + " | ".join(f"{t}, {when}" for t in texts for when in ("before", "after")) + " |",
            "| --- |" + " --- |" * (2 * len(texts)),
        ]
        for unit, row in tuned["rows"].items():
            cells = [f"{row[when][text]:.2f}" for text in texts for when in ("before", "after")]
            lines.append(f"| {'dense control' if unit == 'dense' else unit} | " + " | ".join(cells) + " |")
    lines += ["", f"Made by `python experiments/budget_curve.py`, torch {about['torch']}."]
    return lines


def _quality(text: dict[str, float] | None) -> str:
    if text is None:
        return ""
    above = f" ({text['above']:+.1f} % ± {text['stderr']:.1f})" if "above" in text else ""
    return f"{text['perplexity']:.2f}{above}"


def _ordered(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Dense first, then by falling heads, router and unit."""
    rows = dict(result["rows"])
    dense = rows.pop("dense")

    def place(row: dict[str, Any]) -> tuple[int, int, int]:
        return -row["heads"], ROUTERS.index(row["router"]), UNITS.index(row["unit"])

    return [dense, *sorted(rows.values(), key=place)]


def _plot(file: Path, result: dict[str, Any]) -> None:
    figure_module = require("matplotlib.figure", extra="llm")
    texts = list(result["about"]["heldout_tokens"])
    dense, *rows = _ordered(result)
    figure = figure_module.Figure(figsize=(11.5, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, text in zip(axes[0], texts, strict=True):
        lowest = dense["texts"][text]["perplexity"] if "texts" in dense else 1.0
        _lines(axis, rows, lambda row, text=text: row.get("texts", {}).get(text, {}).get("perplexity"))
        axis.axhline(lowest, color="black", linewidth=0.8)
        axis.set(title=f"held-out perplexity, {text}", yscale="log", ylim=(0.97 * lowest, 4 * lowest))
        ticks = [round(lowest * factor, 1) for factor in (1, 1.1, 1.25, 1.5, 2, 3, 4)]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    for axis, kind in zip(axes[1], ("prefill", "decode"), strict=True):
        _lines(axis, rows, lambda row, kind=kind: row.get(kind, {}).get("to_dense"))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"time per token, {kind}, dense = 1", xlabel="share of heads that a token uses (%)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ROUTERS), fontsize=8)
    scratch = file.with_name(f".{file.name}.partial.png")
    figure.savefig(scratch, dpi=120)
    scratch.replace(file)


def _lines(axis: Any, rows: list[dict[str, Any]], value: Any) -> None:
    """One line for each router and unit."""
    for router in ROUTERS:
        for unit in UNITS:
            points = [(100 * r["share"], value(r)) for r in rows if r["router"] == router and r["unit"] == unit]
            points = [(x, y) for x, y in points if y is not None]
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), _STYLES[router], marker="o", markersize=3,
                      color=_COLOURS[unit], label=f"{unit}: {router}")  # fmt: skip
