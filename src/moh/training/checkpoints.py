"""Checkpoints of a run: which are complete, writing them whole, and those of FSDP, whose weights are in shards.

The transformers Trainer writes a checkpoint file by file; a killed run leaves part of one, which must not be resumed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

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
        # If it is complete, something else failed, perhaps deleting an old one
        if not _is_of_disk(error) or checkpoint_problem(checkpoint) is None:
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


_WEIGHTS = "pytorch_model_fsdp_0"
_TABLE_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
}
"""module -> what the tables of contents that torch.distributed.checkpoint writes name of it."""


class _TableReader(pickle.Unpickler):
    """Reads such a table and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _TABLE_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_shards(checkpoint: Path) -> None:
    """Check that reading a sharded checkpoint runs no code of its own.

    torch.distributed.checkpoint unpickles the table of contents (`.metadata`), and whatever the table does not call a
    tensor, without any restriction.

    Raises:
        ValueError: one of them holds more than plain values; names the file.
    """
    for table in sorted(checkpoint.glob("*/*.metadata")):
        try:
            with open(table, "rb") as file:
                metadata = _TableReader(file).load()
            for index, place in metadata.storage_data.items():
                if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
                    continue  # read with weights_only=True
                with open(table.parent / place.relative_path, "rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            AttributeError,
            TypeError,
            ValueError,
            EOFError,
            RuntimeError,
            KeyError,
        ) as error:
            raise ValueError(
                f"{table} can't be read without running code ({' '.join(str(error).split())}): it is damaged, or not a "
                "checkpoint of a training run"
            ) from None


def has_sharded_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint of the Trainer holds its weights in shards."""
    return (checkpoint / _WEIGHTS).is_dir()


def load_sharded_weights(model: nn.Module, checkpoint: Path) -> None:
    """Read all weights into `model`, in place; each process reads them on its own.

    Raises:
        ValueError: a tensor is missing or has a different shape, or reading would run code (`check_shards`).
    """
    check_shards(checkpoint)
    weights = {"model": model.state_dict()}
    try:
        load(weights, storage_reader=FileSystemReader(checkpoint / _WEIGHTS), no_dist=True)
    except (CheckpointException, RuntimeError) as error:
        raise ValueError(
            f"the weights in {checkpoint} do not match the model: {' '.join(str(error).split())}"
        ) from None
    model.load_state_dict(weights["model"])


def shard_on_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> bool:
    """Turn on the requested FSDP if the processes are on CPUs; returns whether it did.

    Args:
        accelerator: the Trainer's, before it has prepared anything.
        plugin: how to shard; None reads what `accelerate launch` left in the environment.

    Raises:
        ValueError: FSDP1 is requested, which needs GPUs.
    """
    asked = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin() if plugin is None else plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP on CPUs must be version 2, got {plugin.fsdp_version}: set fsdp_version: 2")
    state = accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    for shared in (PartialState(), state):  # `state` copies the value of `PartialState` on each lookup
        shared.distributed_type = DistributedType.FSDP
    return True
