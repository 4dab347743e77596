"""Scores on tasks over the course of training (the paper's figure 2): every checkpoint of each run, and a curve per run.

    python experiments/scores_over_training.py runs/moh runs/dense_control --suite scratch6 --output scores
    python experiments/scores_over_training.py runs/moh runs/dense_control --tasks sciq piqa --limit 500 --output scores

Each RUN is the `output_dir` of `moh train`, which keeps two checkpoints unless `--training.save_total_limit` allows more.
Scores that are already in `--output` are not computed again, so that the command can be repeated while a run goes on. Writes
`scores.csv` (one row per run, step and task), `scores.md` and `scores.png`. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
from pathlib import Path
from typing import Any

from variant_plots import plot_over_training

from moh._files import write_text


def main() -> None:
    """Score every checkpoint and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--suite", help="paper14, scratch6, or a .yaml file of a group of tasks")
    which.add_argument("--tasks", nargs="+", metavar="NAME[:SHOTS]")
    parser.add_argument("--include-path", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--limit", type=int, help="most questions per task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from moh.evaluation.harness import evaluate_tasks

    found = checkpoints(options.runs)
    labels = {label(run, step): path for run, steps in found.items() for step, path in steps}
    result = evaluate_tasks(
        labels,
        options.suite or options.tasks,
        include_paths=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
        output_dir=options.output,
    )
    write(options.output, rows(found, result))


def checkpoints(runs: list[Path]) -> dict[str, list[tuple[int, Path]]]:
    """Run's name -> its checkpoints (step, directory), first to last.

    Raises:
        SystemExit: a run has none, or two runs have the same name.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    for run in runs:
        steps = []
        for path in run.glob("checkpoint-*"):
            if (number := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "config.json").is_file():
                steps.append((int(number[1]), path))
        if not steps:
            raise SystemExit(f"{run} has no directory checkpoint-N with a model: give the output_dir of `moh train`")
        if run.name in found:
            raise SystemExit(f"runs must have different names, got {run.name!r} twice")
        found[run.name] = sorted(steps)
    return found


def label(run: str, step: int) -> str:
    return f"{run}, step {step}"


def rows(found: dict[str, list[tuple[int, Path]]], result: Any) -> list[dict[str, Any]]:
    """One row per run, step and task, in percent where the harness has a share of 1; and "average" where there is one."""
    from moh.evaluation.harness.registry import is_percent

    def row(run: str, step: int, task: str, score: Any, percent: bool) -> dict[str, Any]:
        factor, unit = (100, "%") if percent else (1, "")
        value, stderr = factor * score.value, factor * score.stderr
        return {"run": run, "step": step, "task": task, "value": value, "stderr": stderr, "unit": unit}

    places = {model.label: place for place, model in enumerate(result.models)}
    made: list[dict[str, Any]] = []
    for run, steps in found.items():
        for step, _ in steps:
            place = places[label(run, step)]
            for score in result.models[place].scores:
                made.append(row(run, step, score.label, score, is_percent(score.metric)))
            if (mean := result.average(place)) is not None:
                made.append(row(run, step, "average", mean, True))
    return made


def write(out: Path, made: list[dict[str, Any]]) -> None:
    """Write the table, the same as a page, and the curves of the average, or of the only task."""
    from moh.inspection.plots import save

    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(made[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    write_text(out / "scores.csv", text.getvalue())
    tasks = list(dict.fromkeys(row["task"] for row in made))
    units = {row["task"]: f" ({row['unit']})" if row["unit"] else "" for row in made}
    lines = [
        "| run | step | " + " | ".join(task + units[task] for task in tasks) + " |",
        "| --- | --- |" + " --- |" * len(tasks),
    ]
    values = {(row["run"], row["step"], row["task"]): row for row in made}
    for run, step in dict.fromkeys((row["run"], row["step"]) for row in made):
        cells = [_shown(values[run, step, task]) for task in tasks]
        lines.append(f"| {run} | {step:,} | " + " | ".join(cells) + " |")
    write_text(out / "scores.md", "\n".join(lines) + "\n")
    shown = "average" if "average" in tasks else tasks[0]
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    errors: dict[str, list[float]] = {}
    for row in made:
        if row["task"] == shown:
            curves.setdefault(row["run"], [[]])[0].append((row["step"], row["value"]))
            errors.setdefault(row["run"], []).append(row["stderr"])
    unit = next(row["unit"] for row in made if row["task"] == shown)
    quantity = f"{shown} ({unit})" if unit else shown
    figure = plot_over_training(curves, quantity=quantity, title="Score over training", over="step", errors=errors)
    save(figure, out / "scores.png")
    print(out / "scores.md")


def _shown(row: dict[str, Any]) -> str:
    """A score as in the tables of `moh eval lm`; some have no standard error."""
    digits = 1 if row["unit"] == "%" else 3
    value = f"{row['value']:.{digits}f}"
    return value if math.isnan(row["stderr"]) else f"{value} ± {row['stderr']:.{digits}f}"


if __name__ == "__main__":
    main()
