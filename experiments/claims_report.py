"""The page of `claims.py`: each arm's perplexity, each claim as a difference between two arms, and the curves over training."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from result_names import command
from variant_plots import plot_over_training

from moh._files import write_text
from moh.inspection.plots import save

Runs = dict[str, list[dict[str, Any]]]

# What is compared, arm against control, where both have run
CLAIMS = (
    ("Gates alone: all heads, weighted", "gates", "dense"),
    ("Fewer heads, the same for every token", "static_75", "dense"),
    ("The paper's whole: gates and routing", "moh_75", "dense"),
    ("Routed against static heads", "moh_75", "static_75"),
    ("Routed against static heads, both with gates", "moh_75", "static_gates_75"),
    ("Gates on static heads", "static_gates_75", "static_75"),
    ("Leaving out a quarter of gated heads", "moh_75", "gates"),
    ("The paper's whole, half of the heads", "moh_50", "dense"),
    ("Routed against static heads, half of them", "moh_50", "static_50"),
)
# 97.5 % quantiles of Student's t by degrees of freedom: with three seeds an interval is 4.3 standard errors to each side
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_SHARED = (
    "layers width vocabulary seq_len batch tokens learning_rate corpora precision compile torch device threads".split()
)


def collect(options: argparse.Namespace) -> bool:
    """Write the JSON of all arms of which every seed is finished; False if there is none.

    Also False, and nothing is written, if the file there has runs that are not finished here, as in a new `--work`.
    """
    from claims import cell_file

    runs: Runs = {}
    for name in options.arms:
        files = [cell_file(name, seed, options) for seed in options.seeds]
        if all(file.exists() for file in files):
            runs[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not runs:
        return False
    file = options.out / f"{options.name}.json"
    before: Runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if missing := sorted(_cells(before) - _cells(runs)):
        some = ", ".join(f"{arm} {seed}" for arm, seed in missing[:3])
        print(f"{file} is kept: it has {len(missing)} runs that are not finished in {options.work}, such as {some}")
        return False
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(runs) + "\n")
    return True


def _cells(runs: Runs) -> set[tuple[str, int]]:
    return {(arm, run["seed"]) for arm, of_arm in runs.items() for run in of_arm}


def write_page(out: Path, name: str) -> None:
    """Write `name.md` and `name.png` from `name.json` in `out`.

    Raises:
        SystemExit: there is no JSON: no arm has run with all of its seeds.
    """
    file = out / f"{name}.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing: no arm has run with all of its seeds yet")
    runs: Runs = json.loads(file.read_text(encoding="utf-8"))
    write_text(out / f"{name}.md", markdown(runs, name))
    curves = {
        of_arm[0]["label"]: [[(tokens / 1e6, loss) for tokens, loss in run["curve"]] for run in of_arm]
        for of_arm in runs.values()
    }
    figure = plot_over_training(
        curves, quantity="held-out loss (nats per token)", title="Mean of the seeds", over="million tokens"
    )
    save(figure, out / f"{name}.png")
    print(out / f"{name}.md")


def markdown(runs: Runs, name: str) -> str:
    """The page."""
    every = [run for of_arm in runs.values() for run in of_arm]
    first, seeds = every[0], len(next(iter(runs.values())))
    about = {key: sorted({json.dumps(run.get(key)) for run in every}) for key in _SHARED}
    claims = [(text, a, b) for text, a, b in CLAIMS if a in runs and b in runs]
    several = [f"{key}: {', '.join(values)}" for key, values in about.items() if len(values) > 1]
    lines = [
        "# The claims, one at a time" if claims else "# Language models from scratch, by their heads",
        "",
        f"{first['layers']} layers, width {first['width']}, heads of {first['width'] // 12}, a vocabulary of "
        f"{first['vocabulary']:,}; {first['tokens']:,} tokens ({first['steps']:,} steps of {first['batch']} x "
        f"{first['seq_len']}) of {', '.join(first['corpora'])}, {first['tokens'] / first['parameters']:.1f} tokens per "
        f"parameter; {seeds} seeds, the same sequences in the same order for every arm of a seed, one learning rate "
        f"({first['learning_rate']:g}) for all. {first['device']}, {first['threads']} thread(s) per run, "
        f"{first['precision']}, {'compiled, ' if first.get('compile') else ''}torch {first['torch']}.",
        *(["", "Not the same for all runs: " + "; ".join(several) + "."] if several else []),
        "",
        *_terms(every),
        "| arm | heads per token | parameters | held-out perplexity | against dense | least and most used routed head |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(arm, of_arm, runs.get("dense")) for arm, of_arm in runs.items()),
        "",
        f"Perplexity of {first['heldout_tokens']:,} held-out tokens, mean ± standard deviation over the seeds.",
    ]
    if claims and seeds > 1:
        lines += [
            "",
            "| claim | arm against control | difference in loss, nats per token | seeds in which the arm is better | so |",
            "| --- | --- | --- | --- | --- |",
            *(_claim(text, runs[a], runs[b]) for text, a, b in claims),
            "",
            f"Differences are taken seed by seed; ± is half of the 95 % interval of their mean (Student's t, {seeds} seeds). "
            "Negative means that the arm is better. Each row is one test: among several, one may differ by chance.",
        ]
    lines += [
        "",
        "Perplexity by text, mean of the seeds:",
        "",
        "| arm | " + " | ".join(first["corpora"]) + " |",
        "| --- |" + " --- |" * len(first["corpora"]),
    ]
    for of_arm in runs.values():
        cells = [
            f"{math.exp(mean(run['corpora_loss'][text]['loss'] for run in of_arm)):.2f}" for text in first["corpora"]
        ]
        lines.append(f"| {of_arm[0]['label']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"![held-out loss over training]({name}.png)",
        "",
        f"Made by `python experiments/claims.py --only page --name {name}` from `{name}.json`, which "
        f"`{_measured_by(runs, name)}` measures.",
    ]
    return "\n".join(lines) + "\n"


def _terms(runs: list[dict[str, Any]]) -> list[str]:
    """What the arms' names mean: a paragraph of those that there are, and an empty line."""
    words, shared = [], sorted({run["shared"] for run in runs if run["router"]})
    if shared:
        heads = f"{shared[0]} shared heads" if len(shared) == 1 else "shared heads as in the table"
        words.append(f"*Gates* are the two-stage router's weights ({heads}).")
    if any(run["label"].startswith("static") for run in runs):
        words.append(
            "*Static* heads are the same for every token: a model that has only these heads, which is what a fixed mask makes "
            "of more."
        )
    return [" ".join(words), ""] if words else []


def _measured_by(runs: Runs, name: str) -> str:
    """The command whose runs these are."""
    from claims import ARMS, CORPORA, NAMES, SIZES

    first = next(iter(runs.values()))
    size = next((size for size, fields in SIZES.items() if all(first[0][key] == fields[key] for key in fields)), None)
    fields = SIZES[size or "small"]
    values = {"size": size or "small", **{key: first[0][key] for key in fields}, "corpora": first[0]["corpora"]}
    values |= {"arms": list(runs), "seeds": [run["seed"] for run in first], "name": name}
    values |= {"precision": first[0]["precision"], "compile": first[0].get("compile", False)}
    defaults = {**fields, "size": "small", "corpora": CORPORA, "arms": list(ARMS), "seeds": [0, 1, 2]}
    defaults |= {"name": NAMES[values["size"]], "precision": None, "compile": False}
    return command("claims.py", values, defaults)


def _row(arm: str, runs: list[dict[str, Any]], dense: list[dict[str, Any]] | None) -> str:
    run = runs[0]
    used = run["shared"] + run["active"] if run["router"] else run["heads"]
    of = f"{used} of {run['heads']}" if used < run["heads"] else f"all {used}"
    values = [run["perplexity"] for run in runs]
    cells = [run["label"], of, f"{run['parameters']:,}", f"{mean(values):.2f}" + _spread(values)]
    cells.append(
        "–" if dense is None or arm == "dense" else f"{100 * math.expm1(mean(_differences(runs, dense))):+.1f} %"
    )
    loads = [load for run in runs for layer in run.get("load", []) for load in layer[run["shared"] :]]
    chooses = loads and used < run["heads"]
    cells.append(f"{min(loads):.2f}, {max(loads):.2f}" if chooses else "–")
    return "| " + " | ".join(cells) + " |"


def _claim(text: str, runs: list[dict[str, Any]], control: list[dict[str, Any]]) -> str:
    differences = _differences(runs, control)
    middle, half = interval(differences)
    so = "no difference shown" if abs(middle) <= half else "better" if middle < 0 else "worse"
    better = sum(difference < 0 for difference in differences)
    return (
        f"| {text} | {runs[0]['label']} – {control[0]['label']} | {middle:+.4f} ± {half:.4f} | "
        f"{better} of {len(differences)} | {so} |"
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval, for 2 values or more."""
    return mean(values), _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by Cornish and Fisher's expansion, within 0.003."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.372 / degrees + 2.82 / degrees**2


def _differences(runs: list[dict[str, Any]], control: list[dict[str, Any]]) -> list[float]:
    other = {run["seed"]: run["loss"] for run in control}
    return [run["loss"] - other[run["seed"]] for run in runs]


def _spread(values: list[float]) -> str:
    return f" ± {stdev(values):.2f}" if len(values) > 1 else ""
