"""Time several contenders against each other in one process: in turns, until there are enough rounds.

Ratios are taken within a round, so that a slow phase of the machine affects both sides.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import Contender

MIN_ROUNDS = 5
MIN_LONG_ROUNDS = 3
LONG_ROUND_SECONDS = 60.0
"""A round this long averages out the machine's fluctuations: `MIN_LONG_ROUNDS` are enough, without a warm-up round."""
MAX_ROUNDS = 60
SAMPLE_SECONDS = 2e-3
"""Shorter work is repeated within a sample, so that the overhead of clock and call is negligible."""


@dataclass(frozen=True)
class Row:
    """One contender's measurement.

    Attributes:
        contender, share, actual: as in `Contender`.
        median, low, high: seconds, or bytes for memory; low and high are quartiles.
        ratio, ratio_low, ratio_high: the same for the ratio to the baseline in the same round.
        rounds: how many were measured.
    """

    contender: str
    share: float | None
    actual: float | None
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def time_in_turns(contenders: Sequence[Contender], *, seconds: float, baseline: str = "dense") -> list[Row]:
    """Time each contender at least `MIN_ROUNDS` times, and until `seconds` have passed (or `MAX_ROUNDS` rounds).

    A different contender goes first in each round, after a warm-up round that does not count. If a round takes over
    `LONG_ROUND_SECONDS`, the warm-up counts too, and `MIN_LONG_ROUNDS` are enough.

    Raises:
        ValueError: no contender has the baseline's name.
    """
    names = [c.name for c in contenders]
    if baseline not in names:
        raise ValueError(f"baseline must be the name of a contender, one of {names}, got {baseline!r}")
    first, repeats = zip(*map(_warm_up, contenders), strict=True)  # seconds, runs per sample
    long = sum(first) > LONG_ROUND_SECONDS
    enough = MIN_LONG_ROUNDS if long else MIN_ROUNDS
    samples = [[spent] if long else [] for spent in first]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(samples[-1]) < MAX_ROUNDS:
            done = min(map(len, samples))
            if done >= enough and time.perf_counter() - start > seconds:
                break
            for step in range(len(contenders)):
                index = (step + done) % len(contenders)
                samples[index].append(_time_once(contenders[index], repeats[index]))
    finally:
        if collecting:
            gc.enable()
    return rows(contenders, samples, names.index(baseline))


def rows(contenders: Sequence[Contender], samples: Sequence[Sequence[float]], baseline: int) -> list[Row]:
    """Medians and quartiles of each contender's samples, and of their ratios to the baseline's."""
    return [
        Row(
            contender.name,
            contender.share,
            contender.actual,
            *_quartiles(values),
            *_quartiles([value / base for value, base in zip(values, samples[baseline], strict=True)]),
            len(values),
        )
        for contender, values in zip(contenders, samples, strict=True)
    ]


def _warm_up(contender: Contender) -> tuple[float, int]:
    """Run it once, or twice if that is cheap; returns the seconds of the last run, and the runs per sample."""
    spent = _time_once(contender, 1)
    if spent > 100 * SAMPLE_SECONDS:
        return spent, 1
    spent = _time_once(contender, 1)
    return spent, max(1, math.ceil(SAMPLE_SECONDS / max(spent, 1e-7)))


def _time_once(contender: Contender, repeats: int) -> float:
    run = contender.run
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower, upper)"""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high
