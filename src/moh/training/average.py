"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class MovingAverage:
    """A copy of a model whose weights follow the model's: `average += (1 - decay) * (weights - average)` after each step.

    The first step copies the weights, so the initial, random ones leave no trace. The decay is a function of the step, so a
    resumed run needs only the state of `module`.

    Args:
        model: what is trained.
        decay: weight of the old average in a step.
        ramp: steps since the first -> upper bound of the decay, so that a short run is not held back; None uses `decay`
            from the second step on.
    """

    def __init__(self, model: nn.Module, decay: float, *, ramp: Callable[[int], float] | None = None) -> None:
        self.model = model
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp

    def decay_at(self, step: int) -> float:
        """The decay of the optimiser's step `step`, counted from 1."""
        if step <= 1:
            return 0.0
        return self.decay if self.ramp is None else min(self.decay, self.ramp(step - 1))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model's weights after a step, counted from 1."""
        averaged, current = self.module.state_dict().values(), self.model.state_dict().values()
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new, 1 - self.decay_at(step))
            else:
                old.copy_(new)


class Averaging(TrainerCallback):  # type: ignore[misc]
    """Moves an average after every step of the optimiser."""

    def __init__(self, average: MovingAverage) -> None:
        self.average = average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(state.global_step)
