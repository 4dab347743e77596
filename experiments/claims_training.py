"""What `claims.py` adds to a training run: a stop in time, with a checkpoint, and held-out losses on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moh._files import write_text


class Progress(TrainerCallback):  # type: ignore[misc]
    """Measures the held-out loss every `every` steps and stops the run, with a checkpoint, when its time is over.

    Points and time of earlier pieces are read from `file`; points after the checkpoint that the run resumes from are measured
    again.

    Args:
        file: where to keep them.
        deadline: as `time.monotonic()`; None never stops.
        every: steps between two points.
        loss: of a model, measured without gradient.

    Attributes:
        curve: (step, held-out loss) so far.
        cpu_seconds: of the process in training, over all pieces; a busy machine does not change them.
        step: the last one.
    """

    def __init__(self, file: Path, deadline: float | None, every: int, loss: Callable[[Any], float]) -> None:
        self._file, self._deadline, self._every, self._loss = file, deadline, every, loss
        kept = (
            json.loads(file.read_text(encoding="utf-8"))
            if file.exists()
            else {"curve": [], "cpu_seconds": 0.0, "step": 0}
        )
        self.curve: list[tuple[int, float]] = [(step, value) for step, value in kept["curve"]]
        self.cpu_seconds: float = kept["cpu_seconds"]
        self.step: int = kept["step"]
        self._start = time.process_time()

    def finished(self, steps: int) -> bool:
        """Whether all steps are done."""
        return self.step >= steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step
        self.curve = [(step, value) for step, value in self.curve if step <= self.step]
        self._start = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step = state.global_step
        if self.step % self._every == 0:
            self.cpu_seconds += time.process_time() - self._start
            self.curve.append((self.step, self._measured(kwargs["model"])))
            self._write()
            self._start = time.process_time()
        if self._deadline is not None and time.monotonic() >= self._deadline and self.step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.process_time()
        self.cpu_seconds += now - self._start
        self._start = now
        self._write()

    def _write(self) -> None:
        kept = {"curve": self.curve, "cpu_seconds": self.cpu_seconds, "step": self.step}
        write_text(self._file, json.dumps(kept) + "\n")

    def _measured(self, model: torch.nn.Module) -> float:
        training = model.training
        model.eval()
        try:
            return self._loss(model)
        finally:
            model.train(training)
