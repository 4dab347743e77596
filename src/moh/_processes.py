"""The processes of `torchrun` or `accelerate launch`, for work that they share outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


@contextmanager
def processes() -> Iterator[PartialState]:
    """Join the processes, or be the only one, while the block runs; `.device` is this process's.

    If the caller has joined them, that stays.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        yield state
    finally:
        if state.num_processes > 1 and not joined:
            state.destroy_process_group()
