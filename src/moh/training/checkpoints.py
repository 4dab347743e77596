"""Checkpoints and results on disk: which checkpoints are complete, which directories writable, replacing them whole.

The transformers Trainer writes a checkpoint file by file; a killed run leaves part of one, which must not be resumed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STATE = "trainer_state.json"
_SHARDS = ".metadata"  # the last file that torch.distributed.checkpoint writes
_DEEPSPEED = "latest"  # the last file that DeepSpeed writes; names the directory with its optimiser


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete `checkpoint-N` of the highest step, or None; warns about each newer incomplete one."""
    for checkpoint in _checkpoints(Path(output_dir)):
        problem = checkpoint_problem(checkpoint)
        if problem is None:
            return checkpoint
        warnings.warn(f"skipping the incomplete checkpoint {checkpoint}: {problem}", stacklevel=2)
    return None


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be resumed from, or None.

    The Trainer writes weights, optimiser, scheduler, random state and, last, `trainer_state.json`, so a readable
    state means that the rest was written. The rest is checked too, because an interrupted deletion or a power failure
    leaves other gaps.
    """
    try:
        trainer_state(checkpoint)
    except FileNotFoundError:
        return f"it has no {_STATE}"
    except (ValueError, KeyError):
        return f"its {_STATE} can't be read"
    if not any(checkpoint.glob("*.safetensors")) and not any(checkpoint.glob("pytorch_model_fsdp*")):
        return "it has no weights"
    optimizer = _DEEPSPEED if is_of_deepspeed(checkpoint) else "optimizer*"
    for pattern in (optimizer, "scheduler.pt", "rng_state*.pth"):
        if not any(checkpoint.glob(pattern)):
            return f"it has no {pattern}"
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors" and not _is_safetensors(file):
            return f"its {file.name} is cut off"
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            return f"its {file.name} is cut off"
        if (
            file.is_dir()
            and file.name.startswith(("pytorch_model_fsdp", "optimizer"))
            and not (file / _SHARDS).exists()
        ):
            return f"its {file.name} is cut off"
    return None


def is_of_deepspeed(checkpoint: Path) -> bool:
    """Whether DeepSpeed wrote the optimiser's states, which nothing else can read."""
    return any(checkpoint.glob("global_step*"))


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint: `global_step`, `log_history`, ...

    Raises:
        FileNotFoundError, ValueError, KeyError: the file is missing, not JSON, or not a Trainer's state.
    """
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    state["global_step"], state["log_history"]
    return state


@contextmanager
def writing_checkpoint(checkpoint: Path, *, writes: bool = True) -> Iterator[None]:
    """Write a checkpoint in the block; if the disk fails, delete the partial one and report what is left.

    Args:
        checkpoint: its directory, next to the earlier ones.
        writes: False on the processes of a distributed run that delete nothing.

    Raises:
        RuntimeError: the checkpoint can't be written; names the last complete one.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's are not `Exception`s
        if (
            not _is_of_disk(error) or checkpoint_problem(checkpoint) is None
        ):  # complete: perhaps an old one can't be deleted
            raise
        if writes:
            shutil.rmtree(checkpoint, ignore_errors=True)
        last = last_complete_checkpoint(checkpoint.parent)
        left = "there is no earlier one" if last is None else f"{last} is complete: a restart resumes from it"
        raise RuntimeError(
            f"the checkpoint {checkpoint} can't be written ({' '.join(str(error).split())}); is the disk full? {left}"
        ) from error


def _is_of_disk(error: BaseException) -> bool:
    """Whether an error comes from writing; safetensors and torch raise their own errors, torch often without a reason."""
    signs = ("I/O error", "inline_container", "PytorchStream", "No space left")
    return isinstance(error, OSError) or any(sign in str(error) for sign in signs)


def check_writable(directory: str | Path, *, name: str) -> None:
    """Check that files can be created in `directory` or its nearest existing parent; leaves nothing behind.

    Raises:
        ValueError: the directory can't be written; the message begins with `name`.
    """
    existing = Path(directory).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{name} {directory} can't be written: {error.strerror} ({existing})") from None


def check_replaceable(directory: str | Path, *, name: str, holding: str = "config.json") -> None:
    """Check that `directory` may be created or replaced: it is missing, empty, or holds a model (the file `holding`).

    Raises:
        ValueError: the directory holds something else, or can't be written; the message begins with `name`.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} {directory} must be a directory, but it is a file")
    if target.is_dir() and any(target.iterdir()) and not (target / holding).is_file():
        raise ValueError(
            f"{name} {directory} must be new, empty or a model's directory; it holds other files, which are kept"
        )
    check_writable(target.parent if target.exists() else target, name=name)


@contextmanager
def replacing_directory(target: Path, *, writes: bool = True, holding: str = "config.json") -> Iterator[Path]:
    """Yield a directory next to `target` that replaces it if the block succeeds, and is deleted if it fails.

    Args:
        target: the directory to create or replace.
        writes: False on the processes of a distributed run that only take part in gathering: they move nothing.
        holding: the file that marks a directory as replaceable.
    """
    target = target.resolve()
    if writes:
        check_replaceable(target, name="output directory", holding=holding)
    scratch = target.with_name(f".{target.name}.partial")  # the same name on every process
    if writes:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        if writes:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    if not writes:
        return
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(scratch, target)
        shutil.rmtree(old)
    else:
        os.replace(scratch, target)


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint directories, newest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def _is_safetensors(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):  # checks that the file is as long as its header says
            return True
    except (SafetensorError, OSError):
        return False
