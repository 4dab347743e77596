"""Several processes train as one does: the same batches, the same losses, the same weights."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_recipe.py")
run_all = runpy.run_path(str(SCRIPT))["run_all"]
RUNS = {
    "dense": [],
    "distilled": ["--training.distillation_weight=0.5", "--training.distillation_temperature=2"],
    "converted": ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--conversion.calibration_tokens=256"],
}


@pytest.mark.timeout(120)
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(options: list[str], tmp_path: Path) -> None:
    options += ["--training.gradient_accumulation_steps=2", "--training.max_steps=6"]

    def runs(batch: int, folder: Path) -> list[str]:
        arguments: list[str] = []
        for name, extra in RUNS.items():
            batched = [f"--training.per_device_train_batch_size={batch}", f"--training.output_dir={folder / name}"]
            arguments += [*options, *extra, *batched, "---"]
        return arguments

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, SCRIPT, tmp_path / "losses.json", "0", *runs(2, tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, timeout=110, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = dict(zip(RUNS, json.loads((tmp_path / "losses.json").read_text()), strict=True))
    one = dict(zip(RUNS, run_all(runs(4, tmp_path / "one")), strict=True))

    for name in RUNS:
        assert len(set(one[name])) == 6, name
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
        weights = [load_file(tmp_path / n / name / "model" / "model.safetensors") for n in ("two", "one")]
        assert weights[0].keys() == weights[1].keys()
        for tensor, value in weights[1].items():
            assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
    assert one["dense"] != one["converted"] != one["distilled"]
