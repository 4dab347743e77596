"""Comparison of models from what lm-evaluation-harness logged: `lm-eval run ... --output_path DIR --log_samples`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moh.evaluation.harness.evaluate import by_label
from moh.evaluation.harness.registry import HarnessTask, parse_task, suite
from moh.evaluation.harness.results import ModelScores, TaskEvaluation
from moh.evaluation.harness.scores import TaskScore, read_score


def read_logged(
    models: Mapping[str, str | Path] | Sequence[str | Path],
    tasks: str | Sequence[str | HarnessTask] | None = None,
) -> TaskEvaluation:
    """The comparison that `evaluate_tasks` makes, from the harness's own results and samples.

    Args:
        models: label -> the `--output_path` of its runs, the latest of which counts; or only the directories. The first
            is what the others are compared with.
        tasks: name or file of a suite, or the tasks, each as "NAME", "NAME:SHOTS" or a `HarnessTask`; None takes all that
            the first model was asked.

    Raises:
        ValueError: a directory holds no results, those of several models, or none of a task with its shots; or models
            were asked different questions, or run with different limits or versions of the harness.
    """
    models = by_label(models)
    if not models:
        raise ValueError("models must hold at least one, got none")
    runs = {label: _runs(Path(folder)) for label, folder in models.items()}
    first = next(iter(runs.values()))
    if tasks is None:
        specs = [parse_task(name) for name in dict.fromkeys(name for run in first for name in _scored(run.results))]
    elif isinstance(tasks, str):
        specs = list(suite(tasks))
    else:
        specs = [task if isinstance(task, HarnessTask) else parse_task(task) for task in tasks]
    if not specs:
        raise ValueError("tasks must hold at least one, got none")
    found: list[ModelScores] = []
    asked: dict[str, list[Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for label, own in runs.items():
        scores = []
        for spec in specs:
            score, questions, same = _latest(own, spec, f"model {label!r}: {models[label]}")
            if questions != asked.setdefault(spec.name, questions):
                raise ValueError(
                    f"model {label!r}: task {spec.name!r} asked other questions than of {next(iter(runs))!r}"
                )
            if same != settings.setdefault(spec.name, same):
                raise ValueError(
                    f"model {label!r}: task {spec.name!r} ran with {_listed(same)}, that of {next(iter(runs))!r} with "
                    f"{_listed(settings[spec.name])}"
                )
            scores.append(score)
        share = own[0].results["config"].get("share_of_heads", math.nan)  # the model `hf` does not log it
        found.append(ModelScores(label, str(models[label]), share, tuple(scores)))
    limits = {same["limit"] for same in settings.values()}
    limit = max((limit for limit in limits if limit is not None), default=None)
    title = Path(tasks).stem if isinstance(tasks, str) else "tasks"
    versions = sorted({str(same["lm-eval"]) for same in settings.values()})
    return TaskEvaluation(title, tuple(found), limit, {"lm-eval": ", ".join(versions)}, "read from logged samples")


class _Run:
    """One results file of the harness, and the samples that it wrote at the same time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            self.results["results"], self.results["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a results file of lm-evaluation-harness ({error})") from None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for models that are compared."""
        return {"lm-eval": self.results.get("lm_eval_version"), "limit": self.results["config"].get("limit")}

    def score(self, spec: HarnessTask) -> tuple[TaskScore, list[Any]]:
        """The score of a task or group, and what identifies its questions."""
        leaves = sorted(_leaves(self.results, spec.name))
        samples = {leaf: self._samples(leaf) for leaf in leaves}
        questions = [
            (leaf, *sorted((one["doc_id"], one["doc_hash"], one["target_hash"]) for one in rows))
            for leaf, rows in samples.items()
        ]
        about = {**self.results, "samples": samples}
        if leaves == [spec.name]:
            return read_score(about, spec, {}, 0), questions
        metrics = {key.partition(",")[0] for key in self.results["results"][spec.name]}
        # whether a group weighs its tasks by their size is not logged: the way that gives the logged score
        by_size, evenly = (read_score(about, spec, dict.fromkeys(metrics, way), 0) for way in (True, False))
        return (by_size if by_size.parts else evenly), questions

    def _samples(self, task: str) -> list[dict[str, Any]]:
        date = self.file.stem.removeprefix("results_").rpartition("_")[2]
        file = self.file.with_name(f"samples_{task}_{date}.jsonl")
        if not file.is_file():
            raise ValueError(f"{file.parent} holds no {file.name}: run lm-eval with --log_samples")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _latest(runs: Sequence[_Run], spec: HarnessTask, where: str) -> tuple[TaskScore, list[Any], dict[str, Any]]:
    """Score, questions and settings of the latest run of a task with its shots."""
    shots = [run.results.get("n-shot", {}).get(spec.name) for run in runs if spec.name in run.results["results"]]
    if not shots:
        raise ValueError(f"{where} holds no results of the task {spec.name!r}")
    for run in runs:
        found = run.results.get("n-shot", {}).get(spec.name)
        if spec.name in run.results["results"] and (spec.shots is None or found in (None, spec.shots)):
            return *run.score(spec), run.settings
    asked = " and ".join(sorted(set(map(str, shots))))
    raise ValueError(f"{where}: task {spec.name!r} was asked with {asked} shots, not {spec.shots}")


def _runs(folder: Path) -> list[_Run]:
    """Results below a folder, the latest first."""
    files = sorted(folder.rglob("results_*.json"), key=lambda file: file.name, reverse=True)
    if not files:
        raise ValueError(f"{folder} holds no results_*.json of lm-evaluation-harness (lm-eval run --output_path ...)")
    found = [_Run(file) for file in files]
    if len(names := sorted({str(run.results.get("model_name")) for run in found})) > 1:
        raise ValueError(f"{folder} holds results of several models ({', '.join(names)}): give the folder of one")
    return found


def _leaves(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of a group, at any depth; of a task itself."""
    children = results.get("group_subtasks", {}).get(name) or []
    if not children:
        yield name
    for child in children:
        yield from _leaves(results, child)


def _scored(results: Mapping[str, Any]) -> Iterator[str]:
    """Tasks and groups with a score of their own, but not those that are part of such a group."""
    scored = {name for name, row in results["results"].items() if any("," in key for key in row)}
    groups = results.get("group_subtasks", {})
    parts = {
        part for name in scored & set(groups) for child in groups[name] for part in (child, *_below(groups, child))
    }
    yield from (name for name in results["results"] if name in scored - parts)


def _below(groups: Mapping[str, Sequence[str]], name: str) -> Iterator[str]:
    for child in groups.get(name, []):
        yield child
        yield from _below(groups, child)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
