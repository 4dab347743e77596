"""Several processes train as one does: the same images, noise and dropped labels, so the same losses and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(
    team, options: list[str], vae_dir: Path, tmp_path: Path
) -> None:
    options += ["--training.balance_loss_coef=0.5", "--training.balance_loss_scope=global"]
    options += ["--training.gradient_accumulation_steps=2", "--training.save_steps=2"]
    options += ["--training.samples.every=4", "--training.samples.steps=2"]

    def run(processes: int) -> list[list[float]]:
        folder = tmp_path / str(processes)
        batch = f"--training.per_device_train_batch_size={4 // processes}"
        kinds = {"pixels": [], "latents": [f"--data.vae={vae_dir}", f"--data.latents={folder / 'encoded'}"]}
        runs = [[*options, *extra, batch, f"--training.output_dir={folder / name}"] for name, extra in kinds.items()]
        return team("losses", processes, runs=runs)[0]

    for name, ours, theirs in zip(("pixels", "latents"), run(2), run(1), strict=True):
        assert len(set(theirs)) == 6
        assert ours == pytest.approx(theirs, rel=1e-4), name
        for file in ("model/transformer/diffusion_pytorch_model.safetensors", "checkpoint-6/model.safetensors"):
            weights = [load_file(tmp_path / n / name / file) for n in ("2", "1")]
            assert weights[0].keys() == weights[1].keys()
            for tensor, value in weights[1].items():
                assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
        grids = [Image.open(tmp_path / n / name / "samples" / "step-0000004.png") for n in ("2", "1")]
        assert max(high for _, high in ImageChops.difference(*grids).getextrema()) <= 2


def test_sharded_weights_which_would_not_be_averaged_are_refused(team, options: list[str]) -> None:
    for message in team("refusal", 2, options=options, accelerate="fsdp2.yaml"):
        assert message.startswith("FSDP and DeepSpeed's ZeRO-3 are for language models only")
