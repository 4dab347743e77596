"""The targets for the kernels, and which of them a CPU's results reach.

Ratios to dense SDPA with all heads in the same run. A target applies to every one of its cases, so the worst decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.results import Machine, Result, Run


@dataclass(frozen=True)
class Target:
    """One line of the targets' table.

    Attributes:
        what: its name.
        must: highest value allowed on any CPU.
        aim_amx: aim with AMX.
        aim: aim without.
        applies: whether a case is one of its cases.
        value: the value to compare, None if the case has no such row.
        aim_bfloat16: aim without AMX in bfloat16, if it differs.
    """

    what: str
    must: float
    aim_amx: float
    aim: float
    applies: Callable[[Case], bool]
    value: Callable[[Result], float | None]
    aim_bfloat16: float | None = None

    def aim_of(self, machine: Machine, case: Case) -> float:
        """The aim in this case on this machine."""
        if machine.amx:
            return self.aim_amx
        if case.dtype == "bfloat16" and self.aim_bfloat16 is not None:
            return self.aim_bfloat16
        return self.aim


@dataclass(frozen=True)
class Reached:
    """A CPU's results for a target.

    Attributes:
        values: (value, aim, case), the lowest value first; empty if no case was measured.
        must: highest value allowed.
    """

    values: tuple[tuple[float, float, Case], ...]
    must: float

    @property
    def missed(self) -> tuple[tuple[float, Case], ...]:
        """Cases above the allowed value, the worst first."""
        return tuple((value, case) for value, _, case in reversed(self.values) if value > self.must)

    @property
    def aims(self) -> int:
        """Number of cases that reach the aim."""
        return sum(value <= aim for value, aim, _ in self.values)


def judge(target: Target, run: Run) -> Reached:
    """Compare a CPU's results with a target."""
    found = []
    for result in run.results:
        if target.applies(result.case) and (value := target.value(result)) is not None:
            found.append((value, target.aim_of(run.machine, result.case), result.case))
    return Reached(tuple(sorted(found, key=lambda item: item[0])), target.must)


def _ours(share: float) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        row = result.row("ours", share)
        return None if row is None else row.ratio

    return value


def _routing(result: Result) -> float | None:
    routing, ours = result.row("routing", 0.5), result.row("ours", 0.5)
    return None if routing is None or ours is None else routing.median / ours.median


def _core(mode: str, dtype: str | None = None) -> Callable[[Case], bool]:
    return lambda c: c.subject == "core" and c.mode == mode and dtype in (None, c.dtype) and c.length >= 256


def _decode(c: Case) -> bool:
    return c.subject == "decode" and c.length == 4096 and c.batch == 1 and c.heads == 4 * c.kv_heads


def _layer(c: Case) -> bool:
    return c.subject == "layer" and c.mode == "forward" and c.heads * c.width == 2048 and c.length == 512


def _length(length: int) -> Callable[[Case], bool]:
    base = Case("core", "forward")
    return lambda c: (
        (c.subject, c.mode, c.length, c.dtype) == ("core", "forward", length, "float32")
        and (c.batch, c.heads, c.kv_heads, c.width) == (base.batch, base.heads, base.kv_heads, base.width)
    )


TARGETS = (
    Target("core, forward, float32, a = 0.5", 0.45, 0.35, 0.28, _core("forward", "float32"), _ours(0.5)),
    Target("core, forward, bfloat16, a = 0.5", 0.45, 0.35, 0.15, _core("forward", "bfloat16"), _ours(0.5)),
    Target("core, forward, a = 0.75", 0.65, 0.52, 0.40, _core("forward"), _ours(0.75)),
    Target("core, forward, a = 1 (all heads, gates 1)", 0.95, 0.70, 0.55, _core("forward"), _ours(1.0), 0.30),
    Target("core, forward + backward, a = 0.5", 0.50, 0.30, 0.30, _core("forward+backward"), _ours(0.5)),
    Target("decode, cache 4,096, GQA 4:1, a = 0.5", 0.60, 0.35, 0.40, _decode, _ours(0.5), 0.05),
    Target("whole layer, width 2,048, N = 512, learned router, a = 0.5", 0.80, 0.65, 0.65, _layer, _ours(0.5)),
    Target("routing, share of the layer's time at a = 0.5", 0.05, 0.02, 0.02, _layer, _routing),
    Target("core, forward, N = 128, a = 0.5", 0.75, 0.50, 0.40, _length(128), _ours(0.5)),
    Target("core, forward, N = 8,192, a = 0.5", 0.50, 0.35, 0.28, _length(8192), _ours(0.5)),
    Target(
        "peak memory, a = 0.5 and 1",
        1.0,
        1.0,
        1.0,
        lambda c: c.subject == "memory",
        lambda r: max((row.ratio for row in r.rows if row.contender == "ours"), default=None),
    ),
)
