"""DeepSpeed's ZeRO-3 on two processes: trains as one process does, resumes exactly, and saves a whole model.

On the CPU, over gloo, with the settings of `recipes/accelerate/deepspeed_zero3.yaml` as `accelerate launch` passes them;
every tensor is sharded, however small.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moh.training.checkpoints import checkpoint_problem, trainer_state

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def test_two_processes_train_as_one_does_and_go_on_exactly(team, options, tmp_path: Path) -> None:
    options += ["--conversion={shared_heads: 1, active_heads: 2, router: linear, calibration_tokens: 256}"]
    options += ["--training.max_grad_norm=0.5", "--training.save_steps=2"]
    # 2 forward passes of 2 x 3 sequences make the 12 of a step
    shared = [*options, "--training.per_device_train_batch_size=3", "--training.gradient_checkpointing=true"]
    whole = [*shared, f"--training.output_dir={tmp_path / 'whole'}"]
    cut = [*shared, f"--training.output_dir={tmp_path / 'cut'}"]
    more = ([*cut, f"--training.max_steps={count}"] for count in (2, 4, 4))  # the last has nothing left to do
    other = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # as from a user's own configuration: the recipe decides
    losses = team("losses", 2, runs=[whole, *more], accelerate="deepspeed_zero3.yaml", environment=other)[0]
    assert losses[1] == losses[0][:2] and losses[2] == losses[3] == losses[0] and len(set(losses[0])) == 4
    ours, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert ours.keys() == again.keys() and all(ours[tensor].equal(again[tensor]) for tensor in ours)

    team("losses", 1, runs=[[*options, "--training.per_device_train_batch_size=6"]])
    for entry, expected in zip(_logged(tmp_path / "whole"), _logged(tmp_path / "out"), strict=True):
        assert entry == pytest.approx(expected, abs=2e-4)
        assert entry[1] > 0.5  # gradients were clipped
    single = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert ours.keys() == single.keys() and all((ours[tensor] - single[tensor]).abs().max() < 1e-3 for tensor in ours)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert all(tensor.equal(ours[name]) for name, tensor in model.state_dict().items() if name in ours)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert checkpoint_problem(checkpoint) is None
    parts = list(checkpoint.glob("global_step4/*_optim_states.pt"))
    assert len(parts) == 2
    for file in parts:
        own = torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
        assert numbers / 2 <= sum(group.numel() for group in own) < 0.51 * numbers


def _logged(run: Path) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, balance loss) of every step."""
    history = trainer_state(run / "checkpoint-4")["log_history"]
    return [(entry["loss"], entry["grad_norm"], entry["balance_loss"]) for entry in history if "loss" in entry]
