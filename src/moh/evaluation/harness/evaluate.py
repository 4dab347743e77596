"""Language models on tasks of lm-evaluation-harness: one call, from names to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState

from moh._files import check_writable
from moh.evaluation.harness.registry import HarnessTask, TaskRegistry, parse_task, suite
from moh.evaluation.harness.results import ScoreStore, TaskEvaluation
from moh.evaluation.harness.runner import LoadedModel, Options, Runner
from moh.evaluation.speed import device_name

DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate_tasks(
    models: Mapping[str, str | Path | LoadedModel] | Sequence[str | Path],
    tasks: str | Sequence[str | HarnessTask],
    *,
    include_paths: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int | str = 1,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    device_map: Any = None,
    revisions: Mapping[str, str] = MappingProxyType({}),
    seed: int = 1234,
    max_length: int | None = None,
    truncate: bool = False,
    apply_chat_template: bool = False,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> TaskEvaluation:
    """Score causal language models, dense or MoH, on tasks of lm-evaluation-harness.

    Under `accelerate launch` or torchrun the processes share each task's questions; all return the same.

    Args:
        models: label -> directory, hub name, .gguf file or a loaded model; or only paths. The first is what the
            others are compared with.
        tasks: name of a suite (`SUITES`) or file of a group, or the tasks, each as "NAME", "NAME:SHOTS" or a `HarnessTask`.
        include_paths: directories with your own task files in the harness's format.
        limit: most questions per task (of each task in a group), taken from its beginning; None asks all.
        batch_size: requests per forward pass, or "auto" for as many as fit a GPU's memory.
        dtype: of the weights, one of `DTYPES`; "auto" keeps the checkpoint's.
        device: where models run; None takes the accelerator if there is one.
        device_map: spreads each model over devices instead, as in `from_pretrained`; for one process.
        revisions: label -> branch, tag or commit, of models that are hub names.
        seed: for drawing solved examples and everything else random.
        max_length: tokens of the longest request; None allows each model's positions.
        truncate: cut off the beginning of contexts that are longer; otherwise they are an error.
        apply_chat_template: ask each question as a user's turn, after the solved examples as earlier turns, in the format of
            the model's chat template.
        output_dir: where results.json, table.md and table.csv go, and a cache of scores, so that those of the same
            model, task and settings aren't computed again. None writes nothing.
        progress: show progress bars (only on a terminal).

    Raises:
        ValueError: a task, a suite or an option is unknown, a model can't be loaded or does not match its tokenizer, its
            tokenizer lacks the chat template, or a request is longer than its positions.
        RuntimeError: the data of some tasks is not available.
    """
    named = by_label(models)
    specs = (
        list(suite(tasks))
        if isinstance(tasks, str)
        else [task if isinstance(task, HarnessTask) else parse_task(task) for task in tasks]
    )
    _check(named, revisions, specs, limit, batch_size, dtype)
    state = PartialState(cpu=not torch.accelerator.is_available())
    options = Options(
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=_device(device, device_map, state),
        device_map=device_map,
        revisions=revisions,
        seed=seed,
        max_length=max_length,
        truncate=truncate,
        apply_chat_template=apply_chat_template,
        progress=progress and state.is_main_process,
    )
    if batch_size == "auto" and options.device.type == "cpu":
        raise ValueError("batch_size 'auto' fits requests to a GPU's memory: on the CPU give a number")
    directory = None if output_dir is None else Path(output_dir)
    if directory is not None:
        check_writable(directory, name="output_dir")
    if isinstance(tasks, str) and tasks.endswith(".yaml"):  # its tasks may be next to it
        include_paths = [*include_paths, Path(tasks).parent]
    runner = Runner(TaskRegistry(specs, include_paths), options, state, ScoreStore(directory))
    found = tuple(runner.scores(label, source) for label, source in named.items())
    title = Path(tasks).stem if isinstance(tasks, str) else "tasks"
    result = TaskEvaluation(title, found, limit, options.settings(), device_name(options.device))
    if directory is not None and state.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        result.save(directory)
    state.wait_for_everyone()
    return result


def by_label(models: Mapping[str, Any] | Sequence[str | Path]) -> dict[str, Any]:
    """Label -> model; the label of a path is its last part, or all of it if two have the same last part."""
    if isinstance(models, Mapping):
        return dict(models)
    if isinstance(models, (str, Path)):
        raise ValueError(f"models must be a list of paths, or labels and models, got {str(models)!r}")
    short = [Path(model).name or str(model) for model in models]
    labels = [name if short.count(name) == 1 else str(model) for name, model in zip(short, models, strict=True)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"models must differ, got {', '.join(map(str, models))}")
    return dict(zip(labels, models, strict=True))


def _check(
    models: Mapping[str, Any],
    revisions: Mapping[str, str],
    specs: Sequence[HarnessTask],
    limit: int | None,
    batch_size: int | str,
    dtype: str,
) -> None:
    if not models:
        raise ValueError("models must hold at least one, got none")
    if not specs:
        raise ValueError("tasks must hold at least one, got none")
    if unknown := sorted(set(revisions) - {label for label, model in models.items() if isinstance(model, (str, Path))}):
        raise ValueError(
            f"revisions must be of models that are hub names, {', '.join(models)}, got {', '.join(unknown)}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be 'auto' or at least 1, got {batch_size!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _device(device: torch.device | str | None, device_map: Any, state: PartialState) -> torch.device:
    if device_map is not None and (device is not None or state.num_processes > 1):
        raise ValueError(
            f"device_map spreads a model over the devices of one process: leave it or device out, got {device_map!r} with "
            f"device {device} in {state.num_processes} processes"
        )
    if device is None:
        return torch.device(state.device)
    if state.num_processes > 1:
        raise ValueError(
            f"device is for a single process: here each of {state.num_processes} has its own, got {device}"
        )
    return torch.device(device)
