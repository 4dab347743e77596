"""A forward pass with what every head did in it, for models of which nothing is known beforehand, dense ones too.

Over `moh.inspection.trace`, which refuses attention that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from moh.inspection.trace import LayerTrace, attention_layers, trace

Output = TypeVar("Output")


@torch.no_grad()
def observed(model: nn.Module, forward: Callable[[], Output]) -> tuple[Output, list[LayerTrace]]:
    """What `forward()`, which calls `model` once, returns, and its layers; no layers if none is of a known kind."""
    try:
        attention_layers(model)
    except ValueError:
        return forward(), []
    outputs: list[Output] = []
    layers = trace(model, lambda: outputs.append(forward()))
    return outputs[0], layers
