"""Promise: the model works inside diffusers' `DiTPipeline`, with its schedulers and its VAE, and is saved with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from dit_cases import tiny_model

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


def pipeline(scheduler: str = "ddim", **options) -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    transformer = tiny_model(**dict(in_channels=4, num_classes=1000) | options)  # the pipeline's "no class" is 1000
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=SCHEDULERS[scheduler]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiTPipeline, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # the pipeline does not pass its generator to the scheduler
    options = dict(class_labels=[3, 7], guidance_scale=4.0, num_inference_steps=4, output_type="np") | options
    return pipe(generator=generator, **options).images


@pytest.mark.parametrize("dense", [False, True], ids=["moh", "dense"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_draws_with_every_scheduler(scheduler, dense):
    pipe = pipeline(scheduler, **(dict(shared_heads=None, active_heads=None) if dense else {}))
    images = draw(pipe)
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all() and images.std() > 0.01
    assert np.array_equal(draw(pipe), images)
    assert not np.allclose(draw(pipe, class_labels=[4, 8]), images)


def test_without_guidance_any_number_of_classes_will_do():
    assert np.isfinite(draw(pipeline(num_classes=5), class_labels=[0, 4], guidance_scale=1.0)).all()


def test_a_pipeline_with_guidance_names_the_missing_class():
    with pytest.raises(
        ValueError, match="class_labels must be from 0 to num_classes - 1 = 4, or 5 for no class, got 1000"
    ):
        draw(pipeline(num_classes=5), class_labels=[0, 4])


def test_a_saved_pipeline_loads_with_the_model_in_it(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is type(pipe.transformer)
    assert np.array_equal(draw(loaded), draw(pipe))


def test_a_saved_pipeline_keeps_the_setting_of_the_dial(tmp_path):
    pipe = pipeline(shared_heads=1, active_heads=1)
    before = draw(pipe)
    assert pipe.transformer.set_active_heads([3, 2, 1]) == 0.75
    turned = draw(pipe)
    assert not np.array_equal(turned, before)
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert [c.active_heads for c in loaded.transformer.layer_configs()] == [3, 2, 1]
    assert np.array_equal(draw(loaded), turned)


def test_bfloat16_draws_the_same_picture_as_float32(monkeypatch):
    def noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, **_) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)  # torch 2.11 draws other numbers in bfloat16

    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", noise)
    pipe = pipeline()
    expected = draw(pipe)
    got = draw(pipe.to(torch.bfloat16))
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.95
