"""The score of a model on a task, read from the harness's results, and the paired difference of two such scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from moh.evaluation.harness.registry import PREFERRED_METRICS, HarnessTask

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; NaN if there is none."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Part:
    """One task's part of a score: `weight` times the mean of `values`, one per question, in their order."""

    task: str
    weight: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class TaskScore:
    """The score of one model on one task, or on a group of tasks that are scored together.

    Attributes:
        task: its name in the harness.
        label: its name in tables.
        shots: solved examples before each question; None if the tasks of a group differ.
        metric: the harness's name of the score.
        filter: how the answer was cut from what the model wrote; "none" if it wrote nothing.
        value: the score; a share of 1 if `moh.evaluation.harness.registry.is_percent(metric)`.
        stderr: the harness's standard error of `value`; NaN if it has none.
        questions: number of questions asked.
        truncated: requests longer than the model's positions, whose beginning was cut off.
        parts: the scores of the questions; empty if `value` is not a mean of them, such as a perplexity.
        harness: all that the harness returned except the questions themselves.
        weight: in averages (`HarnessTask.weight`).
    """

    task: str
    label: str
    shots: int | None
    metric: str
    filter: str
    value: float
    stderr: float
    questions: int
    truncated: int
    parts: tuple[Part, ...]
    harness: Mapping[str, Any] = field(repr=False, compare=False)
    weight: float = 1.0


def read_score(results: Mapping[str, Any], spec: HarnessTask, weights: Mapping[str, bool], truncated: int) -> TaskScore:
    """The score that counts, from the result of `lm_eval.evaluate` for one task or group.

    Args:
        results: as returned, with `samples`.
        spec: the requested task.
        weights: metric -> whether a group weighs its tasks by their size; empty for a task.
        truncated: as in `TaskScore`.

    Raises:
        ValueError: the task has no such score.
    """
    row = results["results"][spec.name]
    metric, filter = _key(row, spec)
    parts = _parts(results, metric, filter, spec.name, by_size=weights.get(metric))
    value = float(row[f"{metric},{filter}"])
    if parts and abs(sum(part.weight * fmean(part.values) for part in parts) - value) > _TOLERANCE:
        parts = ()
    stderr = row.get(f"{metric}_stderr,{filter}")
    return TaskScore(
        task=spec.name,
        label=spec.title,
        shots=spec.shots,
        metric=metric,
        filter=filter,
        value=value,
        stderr=float(stderr) if isinstance(stderr, (int, float)) else math.nan,
        questions=int(row["sample_len"]),
        truncated=truncated,
        parts=parts,
        harness={name: found for name, found in results.items() if name != "samples"},
        weight=spec.weight,
    )


def difference(score: TaskScore, reference: TaskScore) -> Estimate:
    """`score - reference`. Its standard error is that of the paired differences over the same questions.

    It is NaN if a score is not a mean over its questions, or if a task has a single question.
    """
    value = score.value - reference.value
    if not score.parts or [_shape(part) for part in score.parts] != [_shape(part) for part in reference.parts]:
        return Estimate(value, math.nan)
    squares = 0.0
    for part, other in zip(score.parts, reference.parts, strict=True):
        count = len(part.values)
        if count < 2:
            return Estimate(value, math.nan)
        deltas = [a - b for a, b in zip(part.values, other.values, strict=True)]
        squares += part.weight**2 * variance(deltas) / count
    return Estimate(value, math.sqrt(squares))


def _shape(part: Part) -> tuple[str, float, int]:
    return part.task, part.weight, len(part.values)


def _key(row: Mapping[str, Any], spec: HarnessTask) -> tuple[str, str]:
    """`(metric, filter)` of the score that counts."""
    pairs = [tuple(key.split(",", 1)) for key in row if "," in key and "_stderr," not in key]
    metrics = list(dict.fromkeys(metric for metric, _ in pairs))
    wanted = [spec.metric] if spec.metric else [*PREFERRED_METRICS, *metrics]
    for metric in wanted:
        filters = [filter for name, filter in pairs if name == metric and spec.filter in (None, filter)]
        if filters:
            return str(metric), filters[0]
    asked = ",".join(part for part in (spec.metric, spec.filter) if part)
    raise ValueError(f"task {spec.name!r} has no score {asked!r}; it has {', '.join(','.join(pair) for pair in pairs)}")


def _parts(
    results: Mapping[str, Any], metric: str, filter: str, name: str, *, by_size: bool | None
) -> tuple[Part, ...]:
    """The questions' scores of the task `name` or, if `by_size` is given, of all tasks of that group."""
    found: dict[str, tuple[float, ...]] = {}
    for task, samples in results["samples"].items():
        if by_size is None and task != name:
            continue
        asked = sorted(
            (sample for sample in samples if sample["filter"] == filter), key=lambda sample: sample["doc_id"]
        )
        values = [sample.get(metric) for sample in asked]
        if not values or not all(isinstance(value, (int, float)) or hasattr(value, "__float__") for value in values):
            return ()
        found[task] = tuple(float(value) for value in values)
    total = sum(map(len, found.values()))
    return tuple(
        Part(task, len(values) / total if by_size else 1 / len(found), values) for task, values in sorted(found.items())
    )
