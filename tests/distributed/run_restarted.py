"""One process of a run under torchrun's elastic agent; the last process is killed once, after its third step.

    torchrun --max-restarts=1 ... run_restarted.py STEPS_DIR --training.max_steps=4 ...

Each process writes the number of every finished step to its own file, one file per start.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from moh.training import load_recipe, train

RANK, SIZE, START = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))


class _Steps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        with (Path(sys.argv[1]) / f"start{START}-rank{RANK}").open("a") as file:
            file.write(f"{state.global_step}\n")
        if state.global_step == 3 and START == "0" and int(RANK) == int(SIZE) - 1:
            os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
train(load_recipe(None, sys.argv[2:]), callbacks=[_Steps()])
