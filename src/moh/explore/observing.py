"""A forward pass with what every head did in it, for any model, and the time of a few runs on a shared machine.

`trace` raises an error on unknown attention; `evaluation.speed` measures many rounds, with their spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from moh.inspection.trace import LayerTrace, attention_layers, trace

Output = TypeVar("Output")


@torch.no_grad()
def observed(model: nn.Module, forward: Callable[[], Output]) -> tuple[Output, list[LayerTrace]]:
    """The result of `forward()`, which calls `model` once, and its layers; no layers if none is of a known kind."""
    try:
        attention_layers(model)
    except ValueError:
        return forward(), []
    outputs: list[Output] = []
    layers = trace(model, lambda: outputs.append(forward()))
    return outputs[0], layers


REPEATS = 3


def median_seconds(runs: Sequence[Callable[[], float]], *, repeats: int = REPEATS) -> list[float]:
    """Time some runs.

    Args:
        runs: each does its work once and returns the seconds that it took.
        repeats: timed rounds, after one warm-up.

    Returns:
        median seconds of each run.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(-1, repeats):
        for place in range(len(runs)):
            index = (place + max(turn, 0)) % len(runs)  # a different run goes first in each round
            taken = runs[index]()
            if turn >= 0:
                seconds[index].append(taken)
    return [statistics.median(values) for values in seconds]
