"""The processes of `torchrun` or `accelerate launch`, for work that they share outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


@contextmanager
def processes() -> Iterator[PartialState]:
    """Join the processes, or be the only one, while the block runs; `.device` is this process's."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        yield state
    finally:
        if state.num_processes > 1:
            state.destroy_process_group()
