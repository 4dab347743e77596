"""Two processes train an image classifier as one does with twice the batch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

RUNS = {
    "dense": [
        "--augmentation.repeats=3",
        "--augmentation.random_erasing=0.5",
        "--training.gradient_accumulation_steps=2",
    ],
    "converted": [
        "--conversion={'shared_heads': 1, 'active_heads': 2, 'calibration_images': 16}",
        "--training.balance_loss_coef=0.5",
        "--training.balance_loss_scope=global",
    ],
}


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(team, options: list[str], tmp_path: Path) -> None:
    options += ["--augmentation.crop_padding=2", "--augmentation.label_smoothing=0.1", "--training.ema_decay=0.7"]

    def run(processes: int) -> dict[str, list[float]]:
        folder, batch = tmp_path / str(processes), f"--training.per_device_train_batch_size={6 // processes}"
        runs = [[*options, *extra, batch, f"--training.output_dir={folder / name}"] for name, extra in RUNS.items()]
        return dict(zip(RUNS, team("losses", processes, runs=runs)[0], strict=True))

    two, one = run(2), run(1)
    for name in RUNS:
        assert len(set(one[name])) == 6, name
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
        folders = [tmp_path / processes / name for processes in ("2", "1")]
        weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
        assert weights[0].keys() == weights[1].keys()
        for tensor, value in weights[1].items():
            assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
        assert top1(folders[0]) == top1(folders[1]) and top1(folders[0])
    assert one["dense"] != one["converted"]


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("fsdp2.yaml", id="fsdp2"),
        pytest.param(
            "deepspeed_zero3.yaml",
            id="deepspeed",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ),
    ],
)
def test_sharded_weights_which_would_not_be_saved_are_refused(team, options: list[str], engine: str) -> None:
    for message in team("refusal", 2, options=options, accelerate=engine):
        assert message.startswith("FSDP and DeepSpeed's ZeRO-3 are for language models only")


def top1(folder: Path) -> list[float]:
    log = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_top1"] for entry in log if "eval_top1" in entry]
