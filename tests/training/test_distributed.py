"""Several processes train as one does: the same batches, the same losses, the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

RUNS = {
    "dense": [],
    "distilled": ["--training.distillation_weight=0.5", "--training.distillation_temperature=2"],
    "converted": ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--conversion.calibration_tokens=256"],
}


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(team, options: list[str], tmp_path: Path) -> None:
    options += ["--training.gradient_accumulation_steps=2", "--training.max_steps=6"]

    def run(processes: int) -> dict[str, list[float]]:
        folder, batch = tmp_path / str(processes), f"--training.per_device_train_batch_size={4 // processes}"
        runs = [[*options, *extra, batch, f"--training.output_dir={folder / name}"] for name, extra in RUNS.items()]
        return dict(zip(RUNS, team("losses", processes, runs=runs)[0], strict=True))

    two, one = run(2), run(1)
    for name in RUNS:
        assert len(set(one[name])) == 6, name
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
        weights = [load_file(tmp_path / n / name / "model" / "model.safetensors") for n in ("2", "1")]
        assert weights[0].keys() == weights[1].keys()
        for tensor, value in weights[1].items():
            assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
    assert one["dense"] != one["converted"] != one["distilled"]
