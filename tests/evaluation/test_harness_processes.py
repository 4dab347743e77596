"""Promise: two processes of torchrun share the questions and give the scores of one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness_cases import write_tasks

from moh import _processes

TASKS = ["tiny_choice:1", "tiny_write:1", "tiny_group"]


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(base_dir: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", questions=11)  # an odd number: one process gets more

    def rows(name: str, launcher: list[str]) -> list[dict[str, str]]:
        argv = ["-m", "moh", "eval", "lm", str(base_dir), "--tasks", *TASKS, "--include-path", str(tasks)]
        argv += (
            ["--output", str(tmp_path / name), "--device", "cpu"]
            if not launcher
            else ["--output", str(tmp_path / name)]
        )
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, *launcher, *argv], env=environment, timeout=280, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("| tiny_choice |") == 1  # only one process prints
        return list(csv.DictReader((tmp_path / name / "table.csv").open()))

    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert rows("two", two) == rows("one", [])


@pytest.mark.parametrize("joined", [False, True])
def test_processes_that_the_caller_has_joined_stay_joined(monkeypatch: pytest.MonkeyPatch, joined: bool) -> None:
    left: list[bool] = []
    state = SimpleNamespace(num_processes=2, destroy_process_group=lambda: left.append(True))
    monkeypatch.setattr(_processes, "PartialState", lambda **_: state)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: joined)
    with _processes.processes() as found:
        assert found is state and not left
    assert left == ([] if joined else [True])
