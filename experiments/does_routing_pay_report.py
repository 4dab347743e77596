"""The page and the picture of `does_routing_pay.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from does_routing_pay_models import (
    AVERAGES,
    FIXED_HEADS,
    METHODS,
    MODELS,
    NOT_MODELS,
    ROUTED,
    SHARES,
    SHORT,
    about_blocks,
)
from result_names import commands

from moh._extras import require
from moh._files import write_text
from moh.evaluation import perplexity_rise

NAME = "does_routing_pay"
KINDS = ("quality", "speed", "tuned")
SAME = {"quality": ("options",), "speed": ("options",), "tuned": ()}
"""What the cells of one model must have in common to be on one page; tuned ones have a control for each of their options."""
CONTROL = "dense"
"""Tuned as the others are: what their perplexity is compared with."""

_QUALITY: dict[str, Any] = {
    "texts": ("django-docs", "anarchism"),
    "third": "debian-handbook",
    "calibration_tokens": 49_152,
    "heldout_tokens": 4_096,
}
TUNED: dict[str, Any] = {
    "texts": ("django-docs", "anarchism"),
    "third": "debian-handbook",
    "tokens": 49_152,
    "heldout_tokens": 4_096,
    "learning_rate": 3e-4,
    "batch_size": 2,
    "only": ("o_proj",),
    "seed": 0,
    "precision": "fp32",
}
"""What a tuned cell depends on besides its model and share, and the values by default."""

_ABOUT = (
    "Routed heads beside what others do to make attention smaller, all from one calibration and without training "
    "([how each is made](../conversion.md#fixed-heads-and-layers-without-attention)): the same heads for every token, and whole "
    "layers of attention left out, with or without a linear map in their place. Routed heads keep all keys and values; the "
    "others shrink the cache and take less time at the same number of heads, so the right panels of the picture compare at "
    "equal time."
)
_TIMED = [method for method in METHODS if method not in NOT_MODELS]
_COLOURS = dict(zip(METHODS, ("C0", "C6", "C5", "C9", "C4", "C1", "C2", "C3", "C7", "black"), strict=True))


def write(out: Path, images: Path, cells: list[dict[str, Any]]) -> None:
    """Write the page into `out` and the picture into `images`, from all cells that are there."""
    quality = [cell for cell in cells if cell["kind"] == "quality"]
    speed = [cell for cell in cells if cell["kind"] == "speed"]
    if not quality:
        return
    models = _models(quality)
    lines = ["# Does routing pay?", "", f"![perplexity against time and cache](../images/{NAME}.png)", "", _ABOUT]
    for model in models:
        of_model = [cell for cell in quality if cell["model"] == model]
        lines += ["", f"## {model}", "", *_quality(of_model), *_compared(of_model)]
        of_model = [cell for cell in speed if cell["model"] == model]
        lines += ["", *_speed(of_model)] if of_model else []
        of_model = [cell for cell in cells if cell["kind"] == "tuned" and cell["model"] == model]
        lines += ["", *_tuned(of_model)] if of_model else []
    lines += ["", "Made by:", "", "```console", *(f"$ {line}" for line in made_by(cells)), "```"]
    out.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{NAME}.md", "\n".join(lines) + "\n")
    _plot(images / f"{NAME}.png", quality, speed)


def _models(cells: list[dict[str, Any]]) -> list[str]:
    found = dict.fromkeys(cell["model"] for cell in cells)
    return [*(model for model in MODELS if model in found), *(model for model in found if model not in MODELS)]


def _compared(cells: list[dict[str, Any]]) -> list[str]:
    """How much more fixed heads lose than routed ones of the same calibration, at each share that both have."""
    rises: dict[tuple[str, float], float] = {}
    for cell in cells:
        rises[cell["method"], cell["aim"]] = sum(t["above"] for t in cell["texts"].values()) / len(cell["texts"])
    shares = sorted({aim for _, aim in rises if (SHORT, aim) in rises and (FIXED_HEADS, aim) in rises}, reverse=True)
    ratios = [f"{rises[FIXED_HEADS, s] / rises[SHORT, s]:.1f} at {s:.0%} of the heads" for s in shares]
    both = "Fixed heads against routed ones, both calibrated in blocks of 512, ratio of the mean rises"
    return ["", f"{both}: {', '.join(ratios)}."] if ratios else []


def _quality(cells: list[dict[str, Any]]) -> list[str]:
    first = cells[0]
    texts = list(first["heldout_tokens"])
    lines = [
        f"Calibrated on {first['calibration_tokens']:,} tokens of {' and '.join(first['calibrated_on'])}, "
        f"{about_blocks(cell['method'] for cell in cells)}, no gradient step. "
        "Held-out perplexity above the dense model's in percent (± standard error of the paired difference over blocks of 512 "
        f"tokens); {texts[-1]} is of neither kind. Dense: "
        + ", ".join(f"{text} {first['dense'][text]:.2f} on {first['heldout_tokens'][text]:,} tokens" for text in texts)
        + f"; {first['dense_cache']:,} bytes of keys and values per token. {first['cpu']}, {first['threads']} thread(s), torch "
        f"{first['torch']}, float32. In brackets the share of heads that the tokens of this text used where it is an average. "
        "Random heads and the oracle, which knows the true contributions, have in every layer as many heads as the routed model "
        "that was calibrated in blocks of 512, the same number for every token.",
        "",
        "| share of heads | method | " + " | ".join(texts) + " | cache | parameters |",
        "| --- | --- |" + " --- |" * (len(texts) + 2),
    ]
    for cell in sorted(cells, key=lambda cell: (-cell["aim"], METHODS.index(cell["method"]))):
        rises = [f"{t['above']:+.1f} ± {t['stderr']:.1f}" for t in cell["texts"].values()]
        if cell["method"] in AVERAGES:
            heads = sum(cell["used"]) / cell["share"]
            rises = [f"{rise} ({t['used'] / heads:.0%})" for rise, t in zip(rises, cell["texts"].values(), strict=True)]
        size = f"{cell['parameters'] / 1e6:.1f}M" if "parameters" in cell else ""
        cache = f"{cell['cache'] / cell['dense_cache']:.0%}" if cell["method"] not in NOT_MODELS else ""
        lines.append("| " + " | ".join([f"{cell['share']:.0%}", cell["method"], *rises, cache, size]) + " |")
    return lines


def _speed(cells: list[dict[str, Any]]) -> list[str]:
    lengths = sorted({cell["length"] for cell in cells})
    lines = [
        f"Time to the dense model's, measured in turns in one process (median): {cells[0]['cpu']}, {cells[0]['threads']} "
        "thread(s), float32, one text.",
        "",
        "| share of heads | method | "
        + " | ".join(f"{p}, {n:,} tokens" for n in lengths for p in ("prefill", "decode"))
        + " |",
        "| --- | --- |" + " --- |" * (2 * len(lengths)),
    ]
    rows: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault((cell["aim"], cell["method"]), {})[cell["length"]] = cell
    for (_, method), row in sorted(rows.items(), key=lambda item: (-item[0][0], METHODS.index(item[0][1]))):
        share = next(iter(row.values()))["share"]
        figures = [f"{row[n][p]['to_dense']:.2f}" if n in row else "" for n in lengths for p in ("prefill", "decode")]
        lines.append("| " + " | ".join([f"{share:.0%}", method, *figures]) + " |")
    return lines


def _tuned(cells: list[dict[str, Any]]) -> list[str]:
    """Rises above the dense model that was tuned on the same tokens."""
    controls = {json.dumps(_tuning(cell)): cell for cell in cells if cell["method"] == CONTROL}
    for cell in cells:
        if json.dumps(_tuning(cell)) not in controls:
            raise ValueError(
                f"{cell['method']} of {cell['model']} at share {cell['aim']:.3f}, tuned with {_tuning(cell)}, has no dense "
                "control with these options: run does_routing_pay_tuned.py with them"
            )
    lines: list[str] = []
    for key, control in controls.items():
        of_control = [cell for cell in cells if json.dumps(_tuning(cell)) == key and cell is not control]
        o, texts = control["options"], list(control["texts"])
        reached = ", ".join(f"{text} {control['texts'][text]['perplexity']:.2f}" for text in texts)
        lines += [
            f"Tuned by gradient, only the named parts (`training.only`), on {o['tokens']:,} tokens of "
            f"{' and '.join(o['texts'])}, each of them once, in {o['tokens'] // 512 // o['batch_size']} steps; learning rate "
            f"{o['learning_rate']:g}, seed {o['seed']}, {o['precision']}. Held-out perplexity above that of the dense model, "
            f"whose W_O was tuned on the same tokens ({reached}), in percent, ± and brackets as above. The minutes are those of "
            f"one thread on a busy machine; the control took {control['seconds'] / 60:.0f}.",
            "",
            "| share of heads | method | tuned | " + " | ".join(texts) + " | minutes |",
            "| --- | --- | --- |" + " --- |" * (len(texts) + 1),
        ]
        for cell in sorted(of_control, key=lambda cell: (-cell["aim"], cell["method"], cell["options"]["only"])):
            rises = []
            for text in texts:
                ours, theirs = cell["texts"][text], control["texts"][text]
                above, stderr = perplexity_rise(ours["block_losses"], theirs["block_losses"])
                rises.append(f"{above:+.1f} ± {stderr:.1f} ({ours['used']:.0%})")
            what = ", ".join({"o_proj": "W_O", "router": "routers"}.get(name, name) for name in cell["options"]["only"])
            first = [f"{cell['aim']:.0%}", cell["method"], what]
            lines.append("| " + " | ".join([*first, *rises, f"{cell['seconds'] / 60:.0f}"]) + " |")
    return lines


def _tuning(cell: dict[str, Any]) -> dict[str, Any]:
    """What a tuned model and its control have in common."""
    return {name: value for name, value in cell["options"].items() if name != "only"}


def made_by(cells: list[dict[str, Any]]) -> list[str]:
    """The commands that measured the cells."""
    of_kind = {kind: [c for c in cells if c["kind"] == kind] for kind in KINDS}
    found: list[str] = []
    for only, defaults in (
        ("quality", {"only": None, "models": list(MODELS), "shares": [], "methods": list(METHODS), **_QUALITY}),
        (
            "speed",
            {
                "only": None,
                "models": list(MODELS),
                "timed_shares": [],
                "lengths": [512, 8192],
                "methods": _TIMED,
                "repeats": 3,
            },
        ),
    ):
        for model in _models(of_kind[only]):
            shares = "shares" if only == "quality" else "timed_shares"
            own = defaults | {shares: list(SHARES.get(model, ()))}
            calls = []
            for cell in of_kind[only]:
                if cell["model"] == model:
                    call = {"only": only, "models": [model], shares: [cell["aim"]], "methods": [cell["method"]]}
                    o = cell["options"]
                    if only == "speed":
                        call |= {"lengths": [cell["length"]], "repeats": o["repeats"]}
                    else:
                        call |= {"texts": tuple(o["texts"][:2]), "third": o["texts"][2]}
                        call |= {name: o[name] for name in ("calibration_tokens", "heldout_tokens")}
                    calls.append(call)
            found += commands(f"{NAME}.py", calls, own)
    defaults = {"model": next(iter(MODELS)), "method": ROUTED, "shares": list(SHARES[next(iter(MODELS))]), **TUNED}
    calls = []
    for cell in of_kind["tuned"]:
        if cell["method"] != CONTROL:
            options = {name: cell["options"][name] for name in TUNED}
            options |= {"texts": tuple(options["texts"]), "only": tuple(options["only"])}
            calls.append({"model": cell["model"], "method": cell["method"], "shares": [cell["aim"]], **options})
    found += commands(f"{NAME}_tuned.py", calls, defaults)
    return [*found, f"python experiments/{NAME}.py --only page"]


def _plot(file: Path, quality: list[dict[str, Any]], speed: list[dict[str, Any]]) -> None:
    """Rise of the perplexity, the mean over the texts, against the share of heads, the cache and the measured times."""
    figure = require("matplotlib.figure", extra="llm").Figure
    models = _models(quality)
    lengths = sorted({cell["length"] for cell in speed})
    columns = 2 + len(lengths)
    picture = figure(figsize=(3.6 * columns, 3.4 * len(models)), layout="constrained")
    axes = picture.subplots(len(models), columns, squeeze=False, sharey="row")
    for row, model in zip(axes, models, strict=True):
        of_model = [cell for cell in quality if cell["model"] == model]
        times = {(c["method"], c["aim"], c["length"]): c["prefill"]["to_dense"] for c in speed if c["model"] == model}
        for method in METHODS:
            points = sorted((c for c in of_model if c["method"] == method), key=lambda c: c["share"])
            rise = {c["aim"]: sum(t["above"] for t in c["texts"].values()) / len(c["texts"]) for c in points}
            measures = [{c["aim"]: c["share"] for c in points}, {}]
            if method not in NOT_MODELS:
                measures[1] = {c["aim"]: c["cache"] / c["dense_cache"] for c in points}
            measures += [{a: times[method, a, n] for a in rise if (method, a, n) in times} for n in lengths]
            for axis, values in zip(row, measures, strict=True):
                known = [(100 * values[aim], rise[aim]) for aim in rise if aim in values]
                if known:
                    axis.plot(*zip(*known, strict=True), "o-", color=_COLOURS[method], markersize=3, label=method)
        titles = ["heads, %", "cache, % of dense", *(f"time to read {n:,} tokens, % of dense" for n in lengths)]
        for axis, title in zip(row, titles, strict=True):
            axis.set(xlabel=title, yscale="symlog", title=model)
            axis.set_visible(axis.has_data())
            axis.grid(alpha=0.3)
        row[0].set_ylabel("perplexity above dense, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    scratch = file.with_name(f".{file.name}.partial.png")
    picture.savefig(scratch, dpi=110)
    scratch.replace(file)
