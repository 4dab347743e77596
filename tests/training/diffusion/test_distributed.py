"""Several processes train as one does: the same images, noise and dropped labels, hence losses and weights."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "run_recipe.py"))
run_all, run_on_two_processes = SCRIPT["run_all"], SCRIPT["run_on_two_processes"]


@pytest.mark.timeout(240)
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(
    options: list[str], vae_dir: Path, tmp_path: Path
) -> None:
    options += ["--training.balance_loss_coef=0.5", "--training.balance_loss_scope=global"]
    options += ["--training.gradient_accumulation_steps=2", "--training.save_steps=2"]
    options += ["--training.samples.every=4", "--training.samples.steps=2"]

    def runs(batch: int, folder: Path) -> list[str]:
        arguments = []
        for name, extra in {"pixels": [], "latents": [f"--data.vae={vae_dir}"]}.items():
            latents = [f"--data.latents={folder / 'encoded'}"] if extra else []
            batched = [f"--training.per_device_train_batch_size={batch}", f"--training.output_dir={folder / name}"]
            arguments += [*options, *extra, *latents, *batched, "---"]
        return arguments

    losses = run_on_two_processes(runs(2, tmp_path / "two"), tmp_path / "losses.json", timeout=230)
    one = run_all(runs(4, tmp_path / "one"))

    for name, ours, theirs in zip(("pixels", "latents"), losses, one, strict=True):
        assert len(set(theirs)) == 6
        assert ours == pytest.approx(theirs, rel=1e-4), name
        for file in ("model/transformer/diffusion_pytorch_model.safetensors", "checkpoint-6/model.safetensors"):
            weights = [load_file(tmp_path / n / name / file) for n in ("two", "one")]
            assert weights[0].keys() == weights[1].keys()
            for tensor, value in weights[1].items():
                assert (weights[0][tensor] - value).abs().max() < 1e-4, (name, tensor)
        grids = [Image.open(tmp_path / n / name / "samples" / "step-0000004.png") for n in ("two", "one")]
        assert max(high for _, high in ImageChops.difference(*grids).getextrema()) <= 2
