"""Promise: the page pairs the runs of a seed, and only those of seeds that have both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the llm extra is not installed")

import inactive_gates


def cell(gradient: str, seed: int, loss: float, seconds: float | None) -> dict:
    blocks = {"a": [loss, loss + 0.02], "b": [2.0, 2.0]}
    about = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    untuned = {"a": [4.0, 4.0], "b": [5.0, 5.0]}
    return about | {"gradient": gradient, "seed": seed, "untuned": untuned, "tuned": blocks, "cpu_seconds": seconds}


def test_runs_of_a_seed_are_compared_on_the_same_blocks(tmp_path: Path) -> None:
    options = argparse.Namespace(**inactive_gates.DEFAULTS, work=tmp_path, out=tmp_path / "out", name="mine")
    for seed in (0, 1):
        for gradient, loss, seconds in (("zero", 3.0, 10.0), ("dense", 3.01 + 0.02 * seed, None if seed else 20.0)):
            file = inactive_gates.cell_file(options, gradient, seed)
            file.write_text(json.dumps(cell(gradient, seed, loss, seconds)))
    inactive_gates.cell_file(options, "zero", 2).write_text(json.dumps(cell("zero", 2, 3.0, 1.0)))
    inactive_gates.write(options)
    text = (tmp_path / "out" / "mine.md").read_text()
    assert "python experiments/inactive_gates.py --seeds 0 1 --name mine" in text  # without the half-finished third
    assert "| 0 | zero | 20.29 | 7.39 |" in text and "| – | untuned | 54.60 | 148.41 |" in text
    assert "| 0 | +1.00 ± 0.00 | +0.00 ± 0.00 |" in text and "| mean | +2.00 ± 1.00 | +0.00 ± 0.00 |" in text
    assert "A step with `dense` took 2.00 times the processor time (1 of the seeds)" in text
    assert len(json.loads((tmp_path / "out" / "mine.json").read_text())) == 2


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    options = argparse.Namespace(**inactive_gates.DEFAULTS, work=tmp_path)
    names = {inactive_gates.cell_file(options, "zero", 0)}
    for change in ({"steps": 7}, {"router": "linear"}, {"learning_rate": 1e-4}, {"heldout_tokens": 512}):
        names.add(inactive_gates.cell_file(argparse.Namespace(**vars(options) | change), "zero", 0))
    assert len(names) == 5
