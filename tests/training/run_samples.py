"""One process of a run that logs the sequences of each step; started by `test_resumed_samples` with `runpy`.

Gets `options`, `kill_at`, `log` and `environment` as globals; if `kill_at` is above 0, SIGKILL ends that step.
"""

from __future__ import annotations

import gc
import json
import os
import signal

os.environ.update(environment)  # noqa: F821 (given by runpy)

import torch
from transformers import TrainerCallback

from moh.training import load_recipe, train
from moh.training.language.trainer import MoHTrainer

torch.set_num_threads(1)
gc.freeze()  # garbage collection skips what the server imported


class _Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at:  # noqa: F821
            os.kill(os.getpid(), signal.SIGKILL)


class _Logging(MoHTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        rows = torch.stack([inputs["input_ids"], inputs["position_ids"]], 1).flatten(1).tolist()
        with open(f"{log}.{self.args.process_index}", "a") as file:  # noqa: F821
            file.write(json.dumps([self.state.global_step, rows]) + "\n")
        return super().training_step(model, inputs, *args, **kwargs)


import moh.training.language.run  # noqa: E402

moh.training.language.run.MoHTrainer = _Logging
train(load_recipe(None, options), callbacks=[_Watch()])  # noqa: F821
