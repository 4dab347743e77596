"""Scores that are kept in a directory, one file for each model and task, so that nothing is computed twice.

A file is used again only if the model, the task and all settings that the score depends on are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from moh._files import write_text
from moh.evaluation.harness.scores import Part, TaskScore


class ScoreStore:
    """The scores in `directory / "scores"`; with None nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = None if directory is None else directory / "scores"

    def read(self, label: str, task: str, identity: dict[str, Any]) -> TaskScore | None:
        """The score that was kept under this label, task and identity; None if there is none, or it is of another."""
        if self.directory is None:
            return None
        try:
            kept = json.loads(self._file(label, task, identity).read_text(encoding="utf-8"))
            if kept["identity"] != identity:
                return None
            fields = kept["score"]
            parts = tuple(Part(part["task"], part["weight"], tuple(part["values"])) for part in fields.pop("parts"))
            return TaskScore(**fields, parts=parts)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or one that another version wrote
            return None

    def write(self, label: str, score: TaskScore, identity: dict[str, Any]) -> None:
        """Keep a score."""
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


def model_identity(source: str | Path) -> list[Any]:
    """What changes with a model's files: names, sizes and times, and what its small files hold.

    A name on the hub stands for itself: a model that is replaced there under the same name is taken for the same.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return [str(source)]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found: list[Any] = [str(path.resolve())]
    for file in files:
        if file.suffix == ".json":
            found.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
        elif file.is_file():
            found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return found
