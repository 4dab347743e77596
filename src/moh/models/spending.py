"""Hand out a number of heads to the layers of a model so that a cost is least, where a layer may not take any number.

Arithmetic alone: what a layer's heads are worth is measured in `moh.conversion.allocation`, and the dial that changes a
model is in `moh.models.dial`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def spend(costs: Sequence[Mapping[int, float]], total: float) -> list[int]:
    """Heads per layer with the least summed cost among all ways to spend as near to `total` heads as can be.

    Args:
        costs: of each layer: number of heads that it may use -> cost.
        total: heads over all layers; where no choice adds up to it, the nearest sum is taken (the lower one of two).

    Returns:
        heads of each layer, keys of `costs`.
    """
    spent = torch.zeros(1, dtype=torch.float64)  # entry s: least cost of s heads in the layers so far
    choices: list[Tensor] = []
    for layer in costs:
        least = torch.full((len(spent) + max(layer),), torch.inf, dtype=torch.float64)
        choice = torch.zeros(len(least), dtype=torch.int64)
        for heads, cost in sorted(layer.items()):
            reached = spent + cost
            window = slice(heads, heads + len(spent))
            better = reached < least[window]
            least[window] = torch.where(better, reached, least[window])
            choice[window] = torch.where(better, heads, choice[window])
        spent = least
        choices.append(choice)
    sums = spent.isfinite().nonzero().flatten().tolist()
    left = min(sums, key=lambda s: (abs(s - total), s))
    heads_of_layer = []
    for choice in reversed(choices):
        heads_of_layer.append(int(choice[left]))
        left -= heads_of_layer[-1]
    return heads_of_layer[::-1]


def evenly(num_heads: Sequence[int], share: float) -> list[int]:
    """About `share` of each layer's heads; whole numbers whose sums over the first layers stay nearest to it."""
    even, before, seen = [], 0, 0
    for heads in num_heads:
        seen += heads
        upto = math.floor(share * seen + 0.5)
        even.append(upto - before)
        before = upto
    return even
