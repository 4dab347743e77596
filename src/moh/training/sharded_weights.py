"""Read the weights of a sharded checkpoint (`torch.distributed.checkpoint`) into a model that is not sharded.

To resume training, the Trainer itself reads weights and optimiser into each process's shards.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

_WEIGHTS = "pytorch_model_fsdp_0"


def has_sharded_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint of the Trainer holds its weights in shards."""
    return (checkpoint / _WEIGHTS).is_dir()


def load_sharded_weights(model: nn.Module, checkpoint: Path) -> None:
    """Read all weights into `model`, in place; each process reads them on its own.

    Raises:
        ValueError: a tensor is missing or has a different shape.
    """
    weights = {"model": model.state_dict()}
    try:
        load(weights, storage_reader=FileSystemReader(checkpoint / _WEIGHTS), no_dist=True)
    except (CheckpointException, RuntimeError) as error:
        raise ValueError(
            f"the weights in {checkpoint} do not match the model: {' '.join(str(error).split())}"
        ) from None
    model.load_state_dict(weights["model"])
