"""Suites of tasks, groups of lm-evaluation-harness in `suites/`: name, shots and the score that counts; loading tasks.

docs/evaluation.md explains the choice of scores.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""Scores to look for, in this order, in a task given without one; if it has none of them, its first score counts."""

_PERCENT = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1")


@dataclass(frozen=True)
class HarnessTask:
    """One row of a suite.

    Attributes:
        name: the task's, or group of tasks', in the harness.
        shots: solved examples before each question; None takes the task's own number.
        metric: the harness's name of the score that counts; None takes the first of `PREFERRED_METRICS` it has.
        filter: how the answer is cut from the text that the model wrote; None takes the task's first.
        label: its name in tables; None takes `name`.
        folder: its folder below the harness's folder of tasks; None looks through all of them.
        weight: its weight in averages.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None
    label: str | None = None
    folder: str | None = None
    weight: float = 1.0

    @property
    def title(self) -> str:
        """Its name in tables."""
        return self.label or self.name


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def is_percent(metric: str) -> bool:
    """Whether a score is a share of 1, which tables show in percent and average with others."""
    return metric in _PERCENT


SUITE_FILES = Path(__file__).parent / "suites"
"""The suites' files: groups of the harness, which `lm-eval --include_path` finds too."""


def read_suite(file: Path) -> tuple[HarnessTask, ...]:
    """The tasks of a group in the harness's format: its members with their `num_fewshot`.

    `metadata.scores` maps a member to further fields of `HarnessTask`; the harness leaves metadata alone.

    Raises:
        ValueError: it is not a group of named tasks, or `metadata.scores` has another task or field.
    """
    import yaml

    try:
        group = yaml.safe_load(file.read_text(encoding="utf-8"))
        scores = dict((group.get("metadata") or {}).get("scores") or {})
        members: list[dict[str, Any]] = [
            {"task": member} if isinstance(member, str) else member for member in group["task"]
        ]
        named = [(member.get("task") or member["group"], member.get("num_fewshot")) for member in members]
        tasks = tuple(HarnessTask(name, shots, **scores.pop(name, {})) for name, shots in named)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a group of tasks in the harness's format ({_first_line(error)})") from None
    if scores:
        raise ValueError(f"{file}: metadata.scores names {', '.join(scores)}, which the group does not hold")
    return tasks


SUITES: dict[str, tuple[HarnessTask, ...]] = {
    file.stem: read_suite(file) for file in sorted(SUITE_FILES.glob("*.yaml"))
}
"""The suites by name."""


def suite(name: str) -> tuple[HarnessTask, ...]:
    """The tasks of a suite, by name or as a group's file of your own.

    Raises:
        ValueError: there is no such suite or file, or the file is not a group.
    """
    if name.endswith(".yaml") and Path(name).is_file():
        return read_suite(Path(name))
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, or a group's .yaml file, got {name!r}")
    return SUITES[name]


def parse_task(text: str) -> HarnessTask:
    """A task from the command line, NAME or NAME:SHOTS; all else is as in the suites, if they have it.

    Raises:
        ValueError: the shots are not a number of at least 0, or there is no name.
    """
    name, colon, shots = text.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise ValueError(f"tasks must be NAME or NAME:SHOTS with shots of at least 0, got {text!r}")
    known = next((task for tasks in SUITES.values() for task in tasks if task.name == name), HarnessTask(name))
    wanted = int(shots) if colon else None
    return HarnessTask(name, wanted, known.metric, known.filter, known.label, known.folder)


_logger = logging.getLogger(__name__)
_HARNESS_TASKS = Path(lm_eval.__file__).parent / "tasks"
_ADVICE = "; data comes from the Hugging Face hub unless the task names local files: see --include-path"


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data, or a group of tasks whose scores the harness combines.

    Attributes:
        spec: as requested, but with the `shots` that it will use.
        item: the harness's `Task` or `Group`.
    """

    spec: HarnessTask
    item: Any

    @property
    def parts(self) -> list[Any]:
        """The harness's tasks: the task itself, or those of the group."""
        return list(self.item.get_all_tasks()) if isinstance(self.item, Group) else [self.item]

    @property
    def weighs_by_size(self) -> dict[str, bool]:
        """Metric -> whether the group's score is the mean over questions rather than over tasks; empty for a task."""
        joined = self.item.aggregate_metric_list if isinstance(self.item, Group) else []
        return {config.metric: bool(config.weight_by_size) for config in joined}


class TaskRegistry:
    """Where tasks are looked up.

    Reading all of the harness's thousands of files takes long: only those of `include_paths` and of the suites' folders
    are read, and all of them only for a task that isn't found there.

    Args:
        tasks: the tasks to load.
        include_paths: directories with your own task files, which come before the harness's.

    Attributes:
        tasks: the same; a tag, or a group without a score of its own, is replaced by its tasks.

    Raises:
        ValueError: a task or a directory does not exist, or a task is given twice with different shots or scores.
    """

    def __init__(self, tasks: Sequence[HarnessTask], include_paths: Sequence[str | Path] = ()) -> None:
        for path in include_paths:
            if not Path(path).is_dir():
                raise ValueError(f"include_paths must be directories with task files, but there is no {str(path)!r}")
        folders = {_HARNESS_TASKS / task.folder for task in tasks if task.folder is not None}
        own = [Path(path).resolve() for path in include_paths]
        self.manager = TaskManager(include_defaults=False, include_path=[*sorted(folders), *own])
        if not all(self._is_complete(task.name) for task in tasks):
            _logger.info("reading all task files of lm-evaluation-harness")
            self.manager = TaskManager(include_path=own)
        self.tasks = tuple(dict.fromkeys(found for task in tasks for found in self._expand(task)))
        names = [task.name for task in self.tasks]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"tasks must name each task once, but {', '.join(twice)} is given with different shots or scores"
            )

    def identity(self, task: HarnessTask) -> str:
        """A digest that changes with the files that define the task, and with the local data they refer to."""
        return hashlib.sha256(json.dumps(list(self._definitions(task.name)), default=str).encode()).hexdigest()

    def load(self, tasks: Sequence[HarnessTask]) -> list[LoadedTask]:
        """Load the data of tasks of this registry.

        Raises:
            RuntimeError: the data of some is not available; names all of them.
            ValueError: a task can't have that many shots.
        """
        loaded: list[LoadedTask] = []
        missing: list[str] = []
        for task in tasks:
            try:
                found = self.manager.load([task.name])
            except Exception as error:  # a script, a hub client or a parser: whatever a task's data needs
                missing.append(f"{task.name} ({type(error).__name__}: {_first_line(error)})")
            else:
                loaded.append(LoadedTask(task, found.get("groups", {}).get(task.name) or found["tasks"][task.name]))
        if missing:
            count = f"{len(missing)} of {len(tasks)} tasks" if len(tasks) > 1 else "the task"
            raise RuntimeError(f"the data of {count} is not available: {'; '.join(missing)}{_ADVICE}")
        return [_with_shots(task) for task in loaded]

    def _expand(self, task: HarnessTask) -> list[HarnessTask]:
        """The task itself, or the tasks that replace it."""
        entry = self.manager.task_index.get(task.name)
        if entry is None:
            found = difflib.get_close_matches(task.name, self.manager.all_tasks, n=3, cutoff=0.5)
            nearest = f"; did you mean {' or '.join(found)}?" if found else ""
            raise ValueError(f"there is no task {task.name!r}{nearest}")
        members = _members(entry)
        if not members or (entry.cfg or {}).get("aggregate_metric_list"):
            return [task]
        names = [name for name in map(_reference, members) if name is not None]
        if len(names) < len(members):
            raise ValueError(f"group {task.name!r} has no score of its own and defines tasks without names")
        return [part for name in names for part in self._expand(replace(task, name=name, label=None))]

    def _is_complete(self, name: str) -> bool:
        """Whether a task is known and, if it is a group, all its members."""
        entry = self.manager.task_index.get(name)
        return entry is not None and all(self._is_complete(child) for child in _children(entry))

    def _definitions(self, name: str) -> Iterator[Any]:
        entry = self.manager.task_index[name]
        files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files") or {}
        yield name, entry.cfg, [_file_identity(file) for file in _flat(files)]
        for child in _children(entry):
            yield from self._definitions(child)


def _with_shots(task: LoadedTask) -> LoadedTask:
    shots = task.spec.shots
    for part in task.parts:
        own = part.config.num_fewshot
        if shots is not None and own == 0 and shots > 0:
            raise ValueError(
                f"task {part.task_name!r} has no place for solved examples (its shots are fixed at 0), got {shots} shots"
            )
        part.set_config(key="num_fewshot", value=shots if shots is not None else own or 0)
    used = {part.config.num_fewshot for part in task.parts}
    return replace(task, spec=replace(task.spec, shots=used.pop() if len(used) == 1 else None))


def _members(entry: Any) -> list[Any]:
    """The members of a group or a tag; none for a task."""
    if entry.cfg is None:
        return sorted(entry.tags)
    members = entry.cfg.get("task") if "group" in entry.cfg else None
    return members if isinstance(members, list) else []


def _reference(member: str | dict[str, Any]) -> str | None:
    """The name by which a group refers to a member; None for a member it defines itself."""
    if isinstance(member, str):
        return member
    name = member.get("group") or member.get("task")
    return None if "dataset_path" in member or not isinstance(name, str) else name


def _children(entry: Any) -> list[str]:
    return [name for name in map(_reference, _members(entry)) if name is not None]


def _flat(files: Any) -> list[str]:
    if isinstance(files, dict):
        return [file for value in files.values() for file in _flat(value)]
    return list(files) if isinstance(files, list) else [str(files)]


def _file_identity(file: str) -> list[Any]:
    path = Path(file)
    if not path.is_file():
        return [file]
    return [file, hashlib.sha256(path.read_bytes()).hexdigest()]
