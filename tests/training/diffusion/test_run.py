"""A recipe becomes a saved model that draws images; impossible requests are refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moh.data.images.sources import TensorImages
from moh.models.diffusers import MoHDiTTransformer2DModel
from moh.sampling import SamplingSettings, load_image_model, sample
from moh.training import load_recipe, train
from moh.training.diffusion import run

GRIDS = ["--training.samples.every=3", "--training.samples.steps=2", "--training.samples.rows=3"]


def test_a_model_is_trained_logged_and_saved(options: list[str], tmp_path: Path) -> None:
    result = train(load_recipe(None, [*options, *GRIDS, "--training.gradient_checkpointing=true"]))
    out = tmp_path / "out"
    assert result.model_dir == out / "model" and result.resumed_from is None and result.precision == "fp32"
    assert [step for step, _ in result.losses] == [1, 2, 3, 4, 5, 6]
    for entry in result.log_history[:-1]:
        assert entry["active_share"] == pytest.approx(3 / 4)
        assert 0 < entry["balance_loss"] <= 3  # h_r = 3
        assert entry["loss"] == pytest.approx(entry["mse"] + entry["vb"] + 0.01 * entry["balance_loss"], rel=1e-4)

    loaded = load_image_model(out / "model")
    assert type(loaded.transformer) is MoHDiTTransformer2DModel and loaded.class_names == ("cat", "dog")
    assert loaded.sample_shape == (3, 8, 8) and loaded.scheduler.config.clip_sample
    settings = SamplingSettings(steps=2)
    assert torch.equal(sample(loaded, [0, 1], settings), sample(result.model, [0, 1], settings))
    assert not list((out / "model").rglob("*.bin"))  # not a pickle

    (events,) = (out / "runs").iterdir()
    logged = EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/mse", "train/vb", "train/active_share"} <= set(logged.Tags()["scalars"])
    assert [event.step for event in logged.Images("samples")] == [3, 6]
    grids = sorted((out / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-0000003.png", "step-0000006.png"]
    assert Image.open(grids[0]).size == (2 + 2 * 10, 2 + 3 * 10)  # one column per class


def test_the_saved_model_has_the_averaged_weights(options: list[str], tmp_path: Path) -> None:
    train(load_recipe(None, options))
    trained = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    average = load_file(tmp_path / "out" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name.removeprefix("transformer.") for name in trained} == set(average)
    assert not torch.equal(trained["transformer.proj_out.weight"], average["proj_out.weight"])
    # a checkpoint can be loaded as a model
    checkpoint = load_image_model(tmp_path / "out" / "checkpoint-6")
    assert torch.equal(checkpoint.transformer.proj_out.weight, average["proj_out.weight"])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_average_follows_the_weights_at_the_given_rate(options: list[str], tmp_path: Path, decay: float) -> None:
    extra = [f"--training.ema_decay={decay}", "--training.ema_warmup=false", "--training.save_steps=1"]
    train(load_recipe(None, [*options, *extra, "--training.max_steps=3", "--training.save_total_limit=3"]))
    name, average = "proj_out.bias", None
    for step in (1, 2, 3):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        weights = load_file(checkpoint / "model.safetensors")[f"transformer.{name}"]
        average = weights if average is None else decay * average + (1 - decay) * weights
        saved = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")[name]
        torch.testing.assert_close(saved, average, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("extra", "precision"),
    [
        ([], "fp32"),
        (["--training.precision=bf16"], "bf16"),
        (["--model.preset=dit_micro_4", "--model.overrides={'num_layers': 2, 'hidden_size': 32}"], "fp32"),
    ],
    ids=["moh", "moh_bf16", "dense"],
)
def test_training_lowers_the_loss(options: list[str], extra: list[str], precision: str) -> None:
    options += [*extra, "--training.max_steps=40", "--training.per_device_train_batch_size=8"]
    result = train(load_recipe(None, [*options, "--training.save_steps=40"]))
    losses = [loss for _, loss in result.losses]
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:5]) / 5
    assert result.precision == precision
    assert all(p.dtype == torch.float32 for p in result.model.transformer.parameters())
    assert ("active_share" in result.log_history[0]) == ("dit_micro_4" not in extra[0] if extra else True)


def test_latents_are_trained_on_and_the_pipeline_of_diffusers_reads_the_result(
    options: list[str], vae_dir: Path, tmp_path: Path
) -> None:
    options += [f"--data.vae={vae_dir}", f"--data.latents={tmp_path / 'latents'}", *GRIDS]
    result = train(load_recipe(None, options))
    assert result.model.sample_shape == (4, 4, 4)
    assert (tmp_path / "latents" / "latents-00000.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoint-6" / "vae").exists()
    assert (tmp_path / "out" / "samples" / "step-0000006.png").is_file()
    pipe = DiTPipeline.from_pretrained(result.model_dir)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"cat": 0, "dog": 1}
    images = pipe([0, 1], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert sample(load_image_model(result.model_dir), [1], SamplingSettings(steps=2)).shape == (1, 3, 8, 8)


def test_parts_of_a_run_can_be_given_as_objects(options: list[str]) -> None:
    torch.manual_seed(0)
    images = TensorImages(torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8), torch.arange(8) % 3, ("a", "b", "c"))
    model = MoHDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=1, num_classes=3
    )
    recipe = load_recipe(None, [*options, "--data.dataset=nowhere", "--model.preset=unknown"])
    result = train(recipe, images=images, transformer=model)
    assert result.model.transformer is model and result.model.class_names == ("a", "b", "c")


def test_labels_are_dropped_as_often_as_the_model_says(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    forward = MoHDiTTransformer2DModel.forward

    def recording(self, x, timestep, class_labels):
        seen.append(class_labels)
        return forward(self, x, timestep=timestep, class_labels=class_labels)

    monkeypatch.setattr(MoHDiTTransformer2DModel, "forward", recording)
    options[2] = options[2].replace("}", ", 'class_dropout_prob': 0.3}")
    options += ["--training.max_steps=24", "--training.per_device_train_batch_size=24"]
    train(load_recipe(None, options))
    share = float((torch.cat(seen) == 2).float().mean())
    assert 0.24 < share < 0.36


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.preset=dit_xxl", "name must be one of .*moh_dit_s_2_75.*, got 'dit_xxl'"),
        ("--model.overrides={'patch_size': 3}", "sample_size must be a multiple of patch_size = 3, got 8"),
        ("--model.overrides={'shared_heads': 9, 'active_heads': 0}", "layer 0: shared_heads must be between 0 and"),
        ("--data.dataset=/nowhere/at/all", "there is no '/nowhere/at/all'"),
        ("--data.vae=/nowhere", "vae '/nowhere' can't be loaded"),
        ("--training.per_device_train_batch_size=100", "there are 24 training images, fewer than the 100"),
        ("--training.samples.classes=[0, 2]", "training.samples.classes must be between 0 and 1, got 2"),
        ("--training.extra={'fsdp': true}", "training.extra must not set fsdp"),
        (
            "--training.extra={'label_smoothing_factor': 0.1}",
            "label_smoothing_factor: a diffusion model predicts no labels",
        ),
    ],
)
def test_what_cannot_be_served_is_told_before_training(
    options: list[str], override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DiffusionTrainer", None)
    with pytest.raises(ValueError, match=message):
        train(load_recipe(None, [*options, override]))
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "ddpm"])
def test_a_trained_model_draws_the_classes_that_it_is_asked_for(
    options: list[str], tmp_path_factory: pytest.TempPathFactory, scheduler: str
) -> None:
    """Pictures of cats are brighter in the left half, those of dogs in the upper half, by 160 of 255."""
    out = tmp_path_factory.getbasetemp() / "drawn"  # trained once for all three samplers
    options += [f"--training.output_dir={out}", "--training.max_steps=800", "--training.per_device_train_batch_size=24"]
    result = train(load_recipe(None, [*options, "--training.save_steps=800", "--data.flip=false"]))
    settings = SamplingSettings(scheduler=scheduler, steps=50, guidance=1.5)
    cats, dogs = sample(result.model, [0] * 16 + [1] * 16, settings).float().split(16)
    right, lower = slice(4, 8), slice(4, 8)
    for images, dark, bright in (
        (cats, cats[..., right], cats[..., :4]),
        (dogs, dogs[..., lower, :], dogs[..., :4, :]),
    ):
        assert 120 < bright.mean() - dark.mean() < 200
        assert abs(float(images.mean()) - 120) < 20
    assert abs(float(cats[..., :4, :].mean() - cats[..., lower, :].mean())) < 40
    assert abs(float(dogs[..., :4].mean() - dogs[..., right].mean())) < 40
