"""Asks one model after the other the questions of all tasks, and keeps what is finished.

Not for options and their checks (`moh.evaluation.harness.evaluate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh.evaluation.harness.language_model import HarnessModel
from moh.evaluation.harness.registry import LoadedTask, TaskRegistry
from moh.evaluation.harness.results import ModelScores
from moh.evaluation.harness.scores import TaskScore, read_score
from moh.evaluation.harness.store import ScoreStore, model_identity
from moh.evaluation.harness.suites import HarnessTask
from moh.models.transformers.loading import load_causal_lm, load_config, load_tokenizer

_BOOTSTRAP = 1000
"""Resamples for the few scores whose standard error has no formula; the harness's own number takes minutes."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer. It has no files to know it by again: its scores are never taken as kept."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Options:
    """What `evaluate_tasks` was asked for, checked."""

    limit: int | None
    batch_size: int | str
    dtype: str
    device: torch.device
    seed: int
    max_length: int | None
    truncate: bool
    progress: bool

    def settings(self) -> dict[str, Any]:
        """What scores depend on, but for model and task."""
        names = ("dtype", "seed", "max_length", "truncate")
        return {"lm-eval": version("lm-eval"), **{name: getattr(self, name) for name in names}}


class Runner:
    """Loads a model only if one of its scores isn't kept, and the data of a task only if a model needs it."""

    def __init__(self, registry: TaskRegistry, options: Options, state: PartialState, store: ScoreStore) -> None:
        self.registry, self.options, self.state, self.store = registry, options, state, store
        self._tasks: dict[str, LoadedTask] = {}

    def scores(self, label: str, source: str | Path | LoadedModel) -> ModelScores:
        """All scores of one model."""
        identities = self._identities(source)
        found = {name: self.store.read(label, name, identity) for name, identity in identities.items()}
        # the processes must agree on what is left to do, also where they don't see the same files
        (found,) = broadcast_object_list([found])
        left = [task for task in self.registry.tasks if found.get(task.name) is None]
        if not left and not isinstance(source, LoadedModel):
            share, shown = head_share(load_config(source)), str(source)
        else:
            self._load_tasks(left)
            model = self._model(label, source)
            share, shown = head_share(model.config), str(source) if isinstance(source, (str, Path)) else "in memory"
            for task in left:
                score = self._ask(model, label, self._tasks[task.name])
                found[task.name] = score
                if self.state.is_main_process and identities:
                    self.store.write(label, score, identities[task.name])
        scores = tuple(score for task in self.registry.tasks if (score := found[task.name]) is not None)
        return ModelScores(label, shown, share, scores)

    def _identities(self, source: str | Path | LoadedModel) -> dict[str, dict[str, Any]]:
        """What each task's score of this model depends on; empty for a model that can't be known again."""
        if isinstance(source, LoadedModel):
            return {}
        common = {"model": model_identity(source), "limit": self.options.limit, **self.options.settings()}
        return {
            task.name: {**common, "task": self.registry.identity(task), "spec": list(dataclasses.astuple(task))}
            for task in self.registry.tasks
        }

    def _load_tasks(self, tasks: Sequence[HarnessTask]) -> None:
        """Load the data of all tasks before the first question is asked: what can't be had is told at once."""
        new = [task for task in tasks if task.name not in self._tasks]
        with self.state.main_process_first(), _quiet(self.options.progress):
            loaded = self.registry.load(new, seed=self.options.seed)
        self._tasks |= {task.spec.name: task for task in loaded}

    def _model(self, label: str, source: str | Path | LoadedModel) -> HarnessModel:
        options = self.options
        try:
            if isinstance(source, LoadedModel):
                model, tokenizer = source.model, source.tokenizer
            else:
                tokenizer = load_tokenizer(source)
                dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
                model = load_causal_lm(source, dtype=dtype, device=options.device)
            with _quiet(self.options.progress):
                return HarnessModel(
                    model,
                    tokenizer,
                    self.state,
                    batch_size=options.batch_size,
                    max_length=options.max_length,
                    truncate=options.truncate,
                    progress=options.progress,
                )
        except (ValueError, OSError) as error:
            raise ValueError(f"model {label!r}: {error}") from None

    def _ask(self, model: HarnessModel, label: str, task: LoadedTask) -> TaskScore:
        options = self.options
        if options.progress:
            print(f"{label}: {task.spec.title}", file=sys.stderr)
        model.truncated = 0
        try:
            with _quiet(self.options.progress):
                _seed(options.seed)
                # not `simple_evaluate`: it lists all packages of this machine anew for every task
                results = lm_eval.evaluate(
                    model,
                    self.registry.manager.load([task.item]),
                    limit=options.limit,
                    bootstrap_iters=_BOOTSTRAP,
                )
        except ValueError as error:
            raise ValueError(f"model {label!r}, task {task.spec.name!r}: {error}") from None
        truncated = sum(gather_object([model.truncated]))
        score = None if results is None else read_score(results, task.spec, task.weighs_by_size, truncated)
        shared: list[TaskScore | None] = broadcast_object_list([score])
        (score,) = shared
        assert score is not None
        return score


def head_share(config: Any) -> float:
    """Share of the heads that a token uses; 1 for a dense model."""
    return float(getattr(config, "share", 1.0))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep the harness's remarks on what we do on purpose (a loaded model, other shots) off the screen, but no errors.

    It prints some on standard output, which is for results; and progress bars, which are for terminals.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    screen = sys.stderr if progress and sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            yield
    finally:
        logger.setLevel(level)
