"""Two processes train an image classifier as one does with twice the batch."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "run_recipe.py"))
run_all, run_on_two_processes = SCRIPT["run_all"], SCRIPT["run_on_two_processes"]


RUNS = {
    "dense": ["--augmentation.random_erasing=0.5", "--training.gradient_accumulation_steps=2"],
    "converted": [
        "--conversion={'shared_heads': 1, 'active_heads': 2, 'calibration_images': 16}",
        "--training.balance_loss_coef=0.5",
        "--training.balance_loss_scope=global",
    ],
}


@pytest.mark.timeout(280)
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(options: list[str], tmp_path: Path) -> None:
    options += ["--augmentation.crop_padding=2", "--augmentation.label_smoothing=0.1", "--training.ema_decay=0.7"]

    def runs(batch: int, folder: Path) -> list[str]:
        arguments: list[str] = []
        for name, extra in RUNS.items():
            batched = [f"--training.per_device_train_batch_size={batch}", f"--training.output_dir={folder / name}"]
            arguments += [*options, *extra, *batched, "---"]
        return arguments

    losses = run_on_two_processes(runs(3, tmp_path / "two"), tmp_path / "losses.json", timeout=260)
    two = dict(zip(RUNS, losses, strict=True))
    one = dict(zip(RUNS, run_all(runs(6, tmp_path / "one")), strict=True))

    for name in RUNS:
        assert len(set(one[name])) == 6, name
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
        folders = [tmp_path / processes / name for processes in ("two", "one")]
        weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
        assert weights[0].keys() == weights[1].keys()
        for tensor, value in weights[1].items():
            assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
        assert top1(folders[0]) == top1(folders[1]) and top1(folders[0])
    assert one["dense"] != one["converted"]


def top1(folder: Path) -> list[float]:
    log = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_top1"] for entry in log if "eval_top1" in entry]
