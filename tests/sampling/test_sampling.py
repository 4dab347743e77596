"""Promise: image i of a seed does not depend on the rest of the batch; samplers follow their papers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import Tensor, nn

from moh.data.seeds import seed_of
from moh.sampling import SAMPLERS, ImageModel, SamplingSettings, diffusion_scheduler, sample
from moh.sampling.schedulers import make_scheduler
from moh.training.diffusion.loss import predict

LABELS = [0, 1, 2, 3, 4, 0, 1]


def apart(a: Tensor, b: Tensor) -> int:
    """The largest difference in 8-bit levels."""
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_an_image_does_not_depend_on_what_is_drawn_beside_it(tiny, scheduler: str) -> None:
    model, settings = tiny(), SamplingSettings(scheduler=scheduler, steps=5, guidance=2.0, seed=3)
    images = sample(model, LABELS, settings)
    assert images.shape == (7, 1, 8, 8) and images.dtype == torch.uint8
    assert images.float().std(0).mean() > 5  # they differ from each other
    # Matrix products of another size may round differently: by at most one 8-bit level
    assert apart(sample(model, LABELS, settings, batch_size=1), images) <= 1
    assert apart(sample(model, LABELS, settings, batch_size=3), images) <= 1
    assert apart(sample(model, [LABELS[i] for i in (5, 2)], settings, indices=[5, 2]), images[[5, 2]]) <= 1


def test_another_seed_class_or_number_is_another_image(tiny) -> None:
    model, settings = tiny(), SamplingSettings(steps=3)
    image = sample(model, [1], settings)
    assert apart(sample(model, [1], settings), image) == 0
    assert apart(sample(model, [1], dataclasses.replace(settings, seed=1)), image) > 5
    assert apart(sample(model, [2], settings), image) > 5
    assert apart(sample(model, [1], settings, indices=[1]), image) > 5


def test_neighbouring_numbers_have_different_seeds() -> None:
    assert len({seed_of(0, i) for i in range(50_000)} | {seed_of(1, i) for i in range(3)}) == 50_003
    assert all(0 <= seed_of(s, i) < 2**32 for s in (0, 2**40) for i in range(9))


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (0.0, 2), (1.5, 2)])
def test_guidance_costs_a_second_pass_only_if_it_is_on(tiny, guidance: float, passes: int) -> None:
    model, rows = tiny(), []
    model.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    sample(model, [0, 1, 2], SamplingSettings(steps=4, guidance=guidance))
    assert rows == [3 * passes] * 4


def test_guidance_0_forgets_the_class(tiny) -> None:
    settings = SamplingSettings(steps=3, guidance=0.0)
    assert apart(sample(tiny(), [0], settings), sample(tiny(), [4], settings)) == 0


def test_guided_channels_leave_the_others_alone(tiny) -> None:
    model = tiny(in_channels=3)
    both = [SamplingSettings(steps=1, guidance=4.0, guided_channels=c) for c in (1, None)]
    first, every = (sample(model, [2], settings) for settings in both)
    plain = sample(model, [2], SamplingSettings(steps=1))
    assert apart(first[:, :1], every[:, :1]) == 0 and apart(first[:, :1], plain[:, :1]) > 5
    assert apart(first[:, 1:], plain[:, 1:]) == 0 and apart(every[:, 1:], plain[:, 1:]) > 5


def test_ddpm_draws_from_the_gaussian_whose_bound_is_trained(tiny) -> None:
    model = tiny()
    scheduler = make_scheduler(SamplingSettings(scheduler="ddpm", steps=1000), model.scheduler.config)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.register_to_config(clip_sample=False)
    x, output = torch.randn(4, 1, 8, 8), torch.randn(4, 2, 8, 8)
    for t in (1, 10, 400, 999):
        expected = predict(output, x, torch.full((4,), t), model.scheduler)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        got = scheduler.step(output, torch.tensor(t), x, generator=torch.Generator().manual_seed(t)).prev_sample
        wanted = expected.mean + (0.5 * expected.log_variance).exp() * noise
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("steps", [250, 10])
def test_fewer_ddpm_steps_are_the_published_respaced_diffusion(steps: int) -> None:
    """Each kept step is one of a diffusion whose betas are made from the products of the alphas between kept steps."""
    diffusion = diffusion_scheduler(clip=False)
    scheduler = make_scheduler(SamplingSettings(scheduler="ddpm", steps=steps), diffusion.config)
    kept = [round(i * 999 / (steps - 1)) for i in range(steps)]
    assert scheduler.timesteps.tolist() == kept[::-1]
    product = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[kept]
    before = torch.cat([product.new_ones(1), product[:-1]])
    beta = 1 - product / before
    variance = beta * (1 - before) / (1 - product)
    x, noise, where = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for i in (steps - 1, steps // 2, 2, 1, 0):
        clean = (x - (1 - product[i]).sqrt() * noise) / product[i].sqrt()
        mean = beta[i] * before[i].sqrt() * clean + (1 - before[i]) * (1 - beta[i]).sqrt() * x
        share = (where + 1) / 2  # of the way from the posterior's variance to beta, in logarithms
        deviation = (share * beta[i].log() + (1 - share) * variance[i].log()).mul(0.5).exp() if i else 0.0
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        output = torch.cat([noise, where], 1).float()
        got = scheduler.step(output, kept[i], x.float(), generator=torch.Generator().manual_seed(i)).prev_sample
        wanted = mean / (1 - product[i]) + deviation * drawn
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("scheduler", "uses"), [("ddpm", True), ("ddim", False), ("dpm++", False)])
def test_only_ddpm_uses_the_learned_variance(tiny, scheduler: str, uses: bool) -> None:
    model, settings = tiny(), SamplingSettings(scheduler=scheduler, steps=4)
    before = sample(model, [1], settings)
    with torch.no_grad():  # the last layer's outputs are (row, column, channel) of a patch; odd channels are variances
        model.transformer.proj_out.bias[1::2] += 1
    assert (apart(sample(model, [1], settings), before) > 0) == uses


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_a_model_without_variance_draws_too(tiny, scheduler: str) -> None:
    images = sample(tiny(out_channels=1), [1, 2], SamplingSettings(scheduler=scheduler, steps=4))
    assert images.float().std() > 5


class _GaussianPixels(nn.Module):
    """Predicts the noise exactly for independent pixels with mean 0.2 and standard deviation 0.3."""

    def __init__(self, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.config = dict(num_classes=1, in_channels=1, out_channels=1, sample_size=8)
        self.kept = scheduler.alphas_cumprod
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        kept = self.kept[timestep][:, None, None, None]
        return SimpleNamespace(sample=(1 - kept).sqrt() * (x - kept.sqrt() * 0.2) / (kept * 0.3**2 + 1 - kept))


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 250), ("dpm++", 10), ("ddpm", 500)])
def test_a_perfect_model_draws_its_distribution(scheduler: str, steps: int) -> None:
    diffusion = diffusion_scheduler(clip=True)
    model = ImageModel(_GaussianPixels(diffusion), diffusion)
    settings = SamplingSettings(scheduler=scheduler, steps=steps)
    pixels = sample(model, [0] * 60, settings).float() / 127.5 - 1
    assert abs(float(pixels.mean()) - 0.2) < 0.015
    assert abs(float(pixels.std()) - 0.3) < 0.015


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_draws_what_diffusers_pipeline_draws(tiny, vae, guidance: float) -> None:
    model = tiny(in_channels=4, num_classes=1000, vae=vae)  # the pipeline's "no class" is 1000
    settings = SamplingSettings(steps=4, guidance=guidance)
    pipe = DiTPipeline(
        transformer=model.transformer, vae=vae, scheduler=DDIMScheduler.from_config(model.scheduler.config)
    )
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed_of(0, i)) for i in range(2)]
    images = pipe([3, 7], guidance, generator=generators, num_inference_steps=4, output_type="np").images
    got = sample(model, [3, 7], settings)
    assert got.shape == (2, 3, 16, 16)
    assert np.abs(got.permute(0, 2, 3, 1).numpy() / 255 - images).max() < 1.01 / 255


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_bfloat16_draws_the_same_picture_as_float32(tiny, scheduler: str) -> None:
    settings = SamplingSettings(scheduler=scheduler, steps=6, guidance=1.5)
    expected = sample(tiny(), LABELS, settings).float()
    got = sample(tiny().to(dtype=torch.bfloat16), LABELS, settings).float()
    assert torch.isfinite(got).all()
    assert (got - expected).abs().mean() < 0.1 * expected.std()
    assert torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_nan_and_infinity_are_told_with_step_and_image(tiny, scheduler: str, value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.transformer.class_embedder.weight[3] = value
    settings = SamplingSettings(scheduler=scheduler, steps=5)
    with pytest.raises(RuntimeError, match=r"NaN or infinity in step 1 of 5 \(t = 999\), for image 13, 15$"):
        sample(model, [0, 3, 1, 3], settings, indices=range(12, 16))
    assert sample(model, [0, 1], settings).shape[0] == 2


def test_nan_of_the_decoder_is_told(tiny, vae) -> None:
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"NaN or infinity after the last step, for image 0, 1, 2, 3, 4, \.\.\.$"):
        sample(tiny(in_channels=4, vae=vae), [0] * 6, SamplingSettings(steps=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance": -0.5}, r"guidance must be a number of at least 0 \(1 is off\), got -0.5"),
        ({"guidance": float("nan")}, "guidance must be a number of at least 0"),
        ({"steps": 0}, "steps must be at least 1 for ddim, got 0"),
        ({"steps": 1, "scheduler": "ddpm"}, "steps must be at least 2 for ddpm, got 1"),
        ({"scheduler": "euler"}, "scheduler must be one of ddpm, ddim, dpm\\+\\+, got 'euler'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"guided_channels": 0}, "guided_channels must be at least 1, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_told(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**wrong)


def test_wrong_calls_are_told(tiny) -> None:
    with pytest.raises(ValueError, match="class must be between 0 and 4, got 5"):
        sample(tiny(), [0, 5])
    with pytest.raises(ValueError, match="labels must have at least one entry"):
        sample(tiny(), [])
    with pytest.raises(ValueError, match="indices must have as many entries as labels, 1, got 2"):
        sample(tiny(), [0], indices=[1, 2])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sample(tiny(), [0], batch_size=0)
    with pytest.raises(ValueError, match="steps must be at most those of the diffusion, 1000, got 1001"):
        sample(tiny(), [0], SamplingSettings(steps=1001))
    with pytest.raises(ValueError, match="guided_channels must be between 1 and 1, got 3"):
        sample(tiny(), [0], SamplingSettings(steps=1, guidance=2, guided_channels=3))
