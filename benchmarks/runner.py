"""Measure the missing cases and keep each result at once.

`timing` and `memory` measure a case; the subjects list the cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import core, decode, layer, memory, model, presets, vision
from benchmarks.cases import Case, Contender
from benchmarks.results import Result, Run, commit, now
from benchmarks.timing import Row, time_in_turns

TIMED: dict[str, tuple[Callable[[str], list[Case]], Callable[[Case], list[Contender]]]] = {
    "core": (core.cases, core.contenders),
    "decode": (decode.cases, decode.contenders),
    "layer": (layer.cases, layer.contenders),
    "model": (model.cases, model.contenders),
    "vision": (vision.cases, vision.contenders),
    "images": (presets.image_cases, presets.contenders),
    "diffusion": (presets.diffusion_cases, presets.contenders),
}
"""subject -> (its cases in a grid, the contenders of one)."""
SUBJECTS = (*TIMED, "memory")
NEEDED = {"images": ("timm", "vision"), "diffusion": ("diffusers", "diffusion")}
"""subject -> (the package that it needs beyond the extra `llm`, that package's extra)."""

Measure = Callable[[Case], Sequence[Row]]


def select(
    subjects: Sequence[str], grid: str, *, checkpoint: str | None = None, dtype: str = "float32", only: str = ""
) -> list[Case]:
    """The subjects' cases, in order, whose key holds the text `only`."""
    found: list[Case] = []
    for name in subjects:
        if name == "memory":
            found += memory.cases(grid)
        elif name == "model":
            found += model.cases(grid, checkpoint, dtype)
        else:
            found += TIMED[name][0](grid)
    return [case for case in found if only in case.key]


def measure(case: Case, *, seconds: float) -> Sequence[Row]:
    """One case's measurement."""
    if case.subject == "memory":
        return memory.measure(case)
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.backward):
        return time_in_turns(TIMED[case.subject][1](case), seconds=seconds)


def measure_missing(cases: Sequence[Case], run: Run, save: Path, measure: Measure) -> int:
    """Measure the cases that `run` has no result of, writing the run to `save` after each; returns how many failed.

    A case that can't be measured is kept with its reason, and the others continue.
    """
    done, version = run.measured(), commit()
    missing = [case for case in cases if case not in done]
    failed = 0
    with tqdm(missing, unit="case", dynamic_ncols=True) as progress:
        for case in progress:
            progress.set_description(case.key)
            try:
                result = Result(case, tuple(measure(case)), version, now())
            except (RuntimeError, ValueError, OSError) as error:
                failed += 1
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                progress.write(f"{case.key} failed: {reason}")
                result = Result(case, (), version, now(), reason)
            run.add(result)
            run.save(save)
    return failed
