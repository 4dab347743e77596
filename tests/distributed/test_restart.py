"""A process that dies does not end the job: torchrun restarts it from the last checkpoint, and nothing else is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_restarted.py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("sharded", [pytest.param(False, id="ddp"), pytest.param(True, id="fsdp2")])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(team, options, tmp_path: Path, sharded) -> None:
    options += ["--training.per_device_train_batch_size=6", "--training.save_steps=2"]
    killed, whole, steps = (tmp_path / name for name in ("killed", "whole", "steps"))
    steps.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart may find the previous addresses
    environment |= team.launch_environment("fsdp2.yaml") if sharded else {}
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*agent, "--max-restarts=1", "--monitor-interval=0.1", SCRIPT, steps, *options]
    command.append(f"--training.output_dir={killed}")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        try:
            _, errors = job.communicate(timeout=400)
        finally:
            job.terminate()  # not kill(): only a terminated agent ends its processes
    assert job.returncode == 0, errors[-3000:]

    ended = {file.name: file.read_text().split() for file in steps.iterdir()}
    assert ended["start0-rank1"] == ["1", "2", "3"]
    assert ended["start1-rank0"] == ended["start1-rank1"] == ["3", "4"]

    name = "fsdp2.yaml" if sharded else None
    team("train", 2, options=[*options, f"--training.output_dir={whole}"], accelerate=name)
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (killed, whole))
    assert ours.keys() == theirs.keys() and all(ours[tensor].equal(theirs[tensor]) for tensor in ours)
