"""Training runs in a process of their own, for the tests of interruption and of several processes.

    python run_recipe.py LOSSES.json KILL_AT_STEP --training.max_steps=6 ... [--- more options of a second run ...]

Writes the logged losses of each run; with KILL_AT_STEP above 0 the process gets SIGKILL at the end of that step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from moh.training import load_recipe, train


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_all(options: list[str], kill_at: int = 0) -> list[list[float]]:
    """The losses of each of the runs that "---" separates."""
    losses, rest = [], options
    while rest:
        end = rest.index("---") if "---" in rest else len(rest)
        result = train(load_recipe(None, rest[:end]), callbacks=[_Kill(kill_at)])
        losses.append([loss for _, loss in result.losses])
        rest = rest[end + 1 :]
    return losses


def run_on_two_processes(
    options: list[str], target: Path, *, timeout: float, environment: dict[str, str] | None = None
) -> list[list[float]]:
    """`run_all` under torchrun, on two processes of the CPU; `target` is where the losses pass through."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    command = [*launcher, __file__, target, "0", *options]
    done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, kill_at, *options = sys.argv[1:]
    losses = run_all(options, int(kill_at))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(target).write_text(json.dumps(losses))
