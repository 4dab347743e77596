"""FSDP2 over CPU processes: accelerate enables FSDP only for accelerators, though PyTorch's also runs on gloo.

It lets a sharded run and its checkpoints be tried without a GPU, and has no effect on GPUs.
"""

from __future__ import annotations

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


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
    for shared in (PartialState(), state):  # each lookup of the latter copies the former's value
        shared.distributed_type = DistributedType.FSDP
    return True
