"""Several processes train as one does: the same batches, the same losses, the same weights."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = runpy.run_path(str(Path(__file__).with_name("run_recipe.py")))
run_all, run_on_two_processes = SCRIPT["run_all"], SCRIPT["run_on_two_processes"]
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

    losses = run_on_two_processes(runs(2, tmp_path / "two"), tmp_path / "losses.json", timeout=110)
    two = dict(zip(RUNS, losses, strict=True))
    one = dict(zip(RUNS, run_all(runs(4, tmp_path / "one")), strict=True))

    for name in RUNS:
        assert len(set(one[name])) == 6, name
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
        weights = [load_file(tmp_path / n / name / "model" / "model.safetensors") for n in ("two", "one")]
        assert weights[0].keys() == weights[1].keys()
        for tensor, value in weights[1].items():
            assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
    assert one["dense"] != one["converted"] != one["distilled"]
