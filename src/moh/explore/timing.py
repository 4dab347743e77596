"""How long a few runs take on a machine that others use too: in turns, after a warm-up, the median of each.

Not for reports: `moh.evaluation.speed` measures many rounds, with their spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

REPEATS = 3


def median_seconds(runs: Sequence[Callable[[], float]], *, repeats: int = REPEATS) -> list[float]:
    """Time some runs.

    Args:
        runs: each does its work once and returns the seconds that it took.
        repeats: rounds that count, after one that does not.

    Returns:
        the median of each.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(-1, repeats):
        for place in range(len(runs)):
            index = (place + max(turn, 0)) % len(runs)  # another goes first in each round
            taken = runs[index]()
            if turn >= 0:
                seconds[index].append(taken)
    return [statistics.median(values) for values in seconds]
