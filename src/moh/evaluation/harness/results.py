"""Several models on several tasks: averages, differences to the first model, tables, and scores cached between runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh._files import write_text
from moh.evaluation.harness.registry import is_percent
from moh.evaluation.harness.scores import Estimate, Part, TaskScore, difference

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class ModelScores:
    """One model's scores.

    Attributes:
        label: its name in tables.
        source: where it was loaded from.
        share: share of the heads that a token uses by the model's configuration, an average with the threshold router; 1 for
            a dense model, NaN if it is unknown.
        scores: one per task, in the tasks' order.
    """

    label: str
    source: str
    share: float
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class TaskEvaluation:
    """Models on tasks.

    Attributes:
        title: the suite's name, or "tasks".
        models: in the given order; the others are compared with the first.
        limit: most questions per task (of each task in a group); None for all.
        settings: what else the scores depend on, by name.
        machine: the processor's or the GPU's name.
    """

    title: str
    models: tuple[ModelScores, ...]
    limit: int | None
    settings: dict[str, Any]
    machine: str

    def average(self, model: int) -> Estimate | None:
        """Mean over the tasks measured in percent, as a share of 1; None if there are fewer than two.

        Tasks have weights: the two scores of TruthfulQA in a suite count as one task.
        """
        return _mean([(s.weight, Estimate(s.value, s.stderr)) for s in _percent(self.models[model].scores)])

    def difference(self, model: int, task: int) -> Estimate:
        """A model's score on a task minus the first model's, with the standard error of the paired difference."""
        return difference(self.models[model].scores[task], self.models[0].scores[task])

    def average_difference(self, model: int) -> Estimate | None:
        """As `average`, but of the differences."""
        pairs = zip(_percent(self.models[model].scores), _percent(self.models[0].scores), strict=True)
        return _mean([(score.weight, difference(score, reference)) for score, reference in pairs])

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per task and model, for a data frame or a CSV file."""
        for t, first in enumerate(self.models[0].scores):
            for m, model in enumerate(self.models):
                score, delta = model.scores[t], self.difference(m, t)
                yield {
                    "task": score.task,
                    "label": score.label,
                    "shots": score.shots,
                    "metric": score.metric,
                    "filter": score.filter,
                    "model": model.label,
                    "share_of_heads": model.share,
                    "value": score.value,
                    "stderr": score.stderr,
                    "difference": delta.value if m else math.nan,
                    "difference_stderr": delta.stderr if m else math.nan,
                    "questions": first.questions,
                    "truncated": score.truncated,
                }

    def to_frame(self) -> DataFrame:
        """`rows` as a pandas data frame."""
        from pandas import DataFrame

        return DataFrame(list(self.rows()))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, with the harness's results for each model and task."""
        models = [
            {
                "label": model.label,
                "source": model.source,
                "share_of_heads": model.share,
                "tasks": {score.task: dict(score.harness) for score in model.scores},
            }
            for model in self.models
        ]
        rows = [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
            for row in self.rows()
        ]
        about = {"title": self.title, "limit": self.limit, "settings": self.settings, "machine": self.machine}
        return {**about, "rows": rows, "models": models}

    def to_markdown(self) -> str:
        """A table, one row per task and one column per model, with differences to the first and notes on the numbers."""
        labels = [model.label for model in self.models]
        header = ["task", "shots", "score", *labels, *(f"{label} − {labels[0]}" for label in labels[1:])]
        share = ["" if math.isnan(model.share) else f"{100 * model.share:.1f} %" for model in self.models]
        lines = [header, ["---"] * len(header), ["heads used", "", "", *share, *[""] * (len(labels) - 1)]]
        for t, first in enumerate(self.models[0].scores):
            factor = 100 if is_percent(first.metric) else 1
            values = [Estimate(model.scores[t].value, model.scores[t].stderr) for model in self.models]
            deltas = [self.difference(m, t) for m in range(1, len(self.models))]
            shown = [_shown(value, factor) for value in values] + [_shown(delta, factor, "+") for delta in deltas]
            shots = "" if first.shots is None else str(first.shots)
            lines.append([first.label, shots, _metric(first), *shown])
        averages = [self.average(m) for m in range(len(self.models))]
        deltas_of_averages = [self.average_difference(m) for m in range(1, len(self.models))]
        if all(average is not None for average in averages):
            shown = [_shown(average, 100) for average in averages if average is not None]
            shown += [_shown(delta, 100, "+") for delta in deltas_of_averages if delta is not None]
            lines.append(["average", "", "", *shown])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self._notes()}\n"

    def _notes(self) -> str:
        asked = sum(score.questions for score in self.models[0].scores)
        some = "all" if self.limit is None else f"at most {self.limit} per task"
        notes = [f"{asked:,} questions ({some}); ± is the standard error over questions."]
        if len(self.models) > 1:
            notes.append("Differences are paired: both models answered the same questions.")
        if cut := {score.label: score.truncated for model in self.models for score in model.scores if score.truncated}:
            notes.append(f"Requests longer than the model's positions were cut at the beginning: {', '.join(cut)}.")
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value not in (None, False))
        return " ".join([*notes, f"{self.machine}; {settings}."])

    def save(self, directory: Path) -> None:
        """Write results.json, table.md and table.csv, each whole or not at all."""
        from lm_eval.utils import handle_non_serializable

        text = json.dumps(self.to_dict(), default=handle_non_serializable, ensure_ascii=False, indent=1)
        write_text(directory / "results.json", text + "\n")
        write_text(directory / "table.md", f"# Language tasks: {self.title}\n\n{self.to_markdown()}")
        write_text(directory / "table.csv", self.to_frame().to_csv(index=False))


def _percent(scores: Sequence[TaskScore]) -> list[TaskScore]:
    return [score for score in scores if is_percent(score.metric)]


def _mean(estimates: list[tuple[float, Estimate]]) -> Estimate | None:
    """Mean of independent estimates, each with its weight."""
    if len(estimates) < 2:
        return None
    total = math.fsum(weight for weight, _ in estimates)
    value = math.fsum(weight * estimate.value for weight, estimate in estimates) / total
    squares = math.fsum((weight * estimate.stderr) ** 2 for weight, estimate in estimates)
    return Estimate(value, math.sqrt(squares) / total)


def _metric(score: TaskScore) -> str:
    return score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"


def _shown(estimate: Estimate, factor: int, sign: str = "") -> str:
    digits = 1 if factor == 100 else 3
    value = f"{factor * estimate.value:{sign}.{digits}f}"
    return value if math.isnan(estimate.stderr) else f"{value} ± {factor * estimate.stderr:.{digits}f}"


class ScoreStore:
    """A cache of scores in `directory / "scores"`; None stores nothing."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = None if directory is None else directory / "scores"

    def read(self, label: str, task: str, identity: dict[str, Any]) -> TaskScore | None:
        """The stored score of this label, task and identity; None if there is none."""
        if self.directory is None:
            return None
        try:
            kept = json.loads(self._file(label, task, identity).read_text(encoding="utf-8"))
            if kept["identity"] != identity:
                return None
            fields = kept["score"]
            parts = tuple(Part(part["task"], part["weight"], tuple(part["values"])) for part in fields.pop("parts"))
            return TaskScore(**fields, parts=parts)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or one from another version
            return None

    def write(self, label: str, score: TaskScore, identity: dict[str, Any]) -> None:
        """Store a score."""
        if self.directory is None:
            return
        from lm_eval.utils import handle_non_serializable

        self.directory.mkdir(parents=True, exist_ok=True)
        fields = {field.name: getattr(score, field.name) for field in dataclasses.fields(score)}
        fields["parts"] = [dataclasses.asdict(part) for part in score.parts]
        text = json.dumps({"identity": identity, "score": fields}, default=handle_non_serializable, ensure_ascii=False)
        write_text(self._file(label, score.task, identity), text)

    def _file(self, label: str, task: str, identity: dict[str, Any]) -> Path:
        assert self.directory is not None
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^\w.-]+", "_", f"{label}.{task}")
        return self.directory / f"{name}.{digest}.json"


def model_identity(source: str | Path, revision: str | None = None) -> list[Any]:
    """Identifies a model by its files: names, sizes and times, and the contents of small files.

    A hub name and its revision identify themselves: a model replaced there under the same name counts as the same.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return [str(source)] if revision is None else [str(source), revision]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found: list[Any] = [str(path.resolve())]
    for file in files:
        if file.suffix == ".json":
            found.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
        elif file.is_file():
            found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return found
