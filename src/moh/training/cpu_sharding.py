"""FSDP2 over processes of the CPU: accelerate turns FSDP on for accelerators alone, though PyTorch's also runs on gloo.

So that a sharded run can be tried, and its checkpoints looked at, without a GPU. On GPUs nothing here has an effect.
"""

from __future__ import annotations

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> bool:
    """Turn on the FSDP that was asked for where the processes are on CPUs; returns whether it did.

    Args:
        accelerator: of the Trainer, before anything is prepared with it.
        plugin: how to shard; None reads what `accelerate launch` left in the environment.

    Raises:
        ValueError: FSDP1 is asked for, which needs GPUs.
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
    for shared in (PartialState(), state):  # whenever the latter is looked up, it copies what the former says
        shared.distributed_type = DistributedType.FSDP
    return True
