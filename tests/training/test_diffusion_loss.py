"""Promises of the hybrid loss: the published numbers and the definitions; the bound trains only the variance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from diffusers import DDIMScheduler, DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from moh.models.published import load_published
from moh.training.diffusion.loss import add_noise, hybrid_loss, posterior, predict

GOLDEN = Path(__file__).parents[1] / "golden"
DIFFUSION = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=["dit_a", "dit_b"])
def golden(request) -> tuple[dict, dict[str, Tensor]]:
    file = GOLDEN / f"{request.param}.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    return config, load_file(file)


@pytest.fixture(params=[DDPMScheduler, DDIMScheduler])
def scheduler(request):
    return request.param(**DIFFUSION)


def case(t: list[int], channels: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Model output, clean images of 8-bit values, noise, and time steps `t`."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(t), channels, 4, 4)
    clean = torch.randint(256, shape, generator=generator) / 127.5 - 1
    output = torch.cat([torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) * 2 - 1], 1)
    return output, clean, torch.randn(shape, generator=generator), torch.tensor(t)


def test_noised_images_are_the_published_ones(golden, scheduler):
    _, expected = golden
    got = add_noise(expected["input"], expected["noise"], expected["t"], scheduler)
    assert_close(got, expected["q_sample"], 1e-7)


def test_predicted_mean_variance_and_image_are_the_published_ones(golden, scheduler):
    _, expected = golden
    got = predict(expected["output"], expected["input"], expected["t"], scheduler)
    assert_close(got.mean, expected["p_mean_variance.mean"])
    assert_close(got.log_variance, expected["p_mean_variance.log_variance"])
    assert_close(got.log_variance.exp(), expected["p_mean_variance.variance"])
    assert_close(got.clean, expected["p_mean_variance.pred_xstart"])


@torch.no_grad()
def test_losses_are_the_published_ones(golden, scheduler):
    config, tensors = golden
    model = load_published({k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}, config)
    clean, noise, t = tensors["input"], tensors["noise"], tensors["t"]
    noisy = add_noise(clean, noise, t, scheduler)
    got = hybrid_loss(model(noisy, t, tensors["y"]).sample, clean, noisy, noise, t, scheduler)
    for name in ("mse", "vb", "loss"):
        assert_close(getattr(got, name), tensors[f"training_losses.{name}"])


def test_the_posterior_is_bayes_rule():
    scheduler = DDPMScheduler(**DIFFUSION)
    _, clean, noise, t = case([1, 2, 400, 999])
    noisy = add_noise(clean, noise, t, scheduler)
    mean, log_variance = posterior(clean, noisy, t, scheduler)
    kept = (1 - scheduler.betas.double()).cumprod(0)
    for row, step in enumerate(t.tolist()):
        beta, before = scheduler.betas[step].double(), kept[step - 1]
        # x_{t-1} given x_0, and x_t given x_{t-1}, are Gaussian: in their product, precisions add
        precision = 1 / (1 - before) + (1 - beta) / beta
        centre = before.sqrt() * clean[row] / (1 - before) + (1 - beta).sqrt() * noisy[row] / beta
        assert_close(mean[row], (centre / precision).float())
        assert_close(log_variance[row].flatten(), -precision.log().float().view(1))


def test_the_true_noise_predicts_the_clean_image_and_the_posteriors_mean():
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, t = case([0, 10, 500])
    noisy = add_noise(clean, noise, t, scheduler)
    got = predict(torch.cat([noise, output[:, 2:]], 1), noisy, t, scheduler)
    assert_close(got.clean, clean, 1e-4)
    assert_close(got.mean, posterior(clean, noisy, t, scheduler)[0], 1e-5)


@pytest.mark.parametrize(("where", "bound"), [(-1.0, "posterior"), (1.0, "beta")])
def test_the_variance_lies_between_the_posteriors_and_beta(where, bound):
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, t = case([1, 500, 999])
    output[:, 2:] = where
    noisy = add_noise(clean, noise, t, scheduler)
    got = predict(output, noisy, t, scheduler).log_variance
    beta = scheduler.betas[t].log()[:, None, None, None]
    expected = beta if bound == "beta" else posterior(clean, noisy, t, scheduler)[1]
    torch.testing.assert_close(got, expected.expand_as(got))


def test_the_bound_is_the_divergence_in_bits_per_dimension():
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, t = case([1, 20, 999])
    noisy = add_noise(clean, noise, t, scheduler)
    mean, log_variance = posterior(clean, noisy, t, scheduler)
    p = predict(output, noisy, t, scheduler)
    divergence = kl_divergence(
        Normal(mean.double(), (log_variance.double() / 2).exp()),
        Normal(p.mean.double(), (p.log_variance.double() / 2).exp()),
    )
    got = hybrid_loss(output, clean, noisy, noise, t, scheduler)
    assert_close(got.vb, (divergence.flatten(1).mean(1) / math.log(2)).float(), 1e-4)
    assert_close(got.mse, (output[:, :2] - noise).square().flatten(1).mean(1))
    assert_close(got.loss, got.mse + got.vb)


def test_the_last_step_is_the_likelihood_of_8_bit_values():
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, t = case([0, 0])
    clean[0, 0, 0, 0], clean[0, 0, 0, 1] = -1, 1
    noisy = add_noise(clean, noise, t, scheduler)
    output[:, :2] = noise + 0.3 * output[:, :2]
    p = predict(output, noisy, t, scheduler)
    normal = Normal(p.mean.double(), (p.log_variance.double() / 2).exp())
    values = clean.double()
    upper = torch.where(values > 0.999, torch.inf, values + 1 / 255)
    lower = torch.where(values < -0.999, -torch.inf, values - 1 / 255)
    probability = normal.cdf(upper) - normal.cdf(lower)
    got = hybrid_loss(output, clean, noisy, noise, t, scheduler).vb
    assert_close(got, (-probability.log2()).flatten(1).mean(1).float(), 1e-4)


def test_the_bound_trains_the_variance_alone():
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, t = case([0, 5, 900])
    noisy = add_noise(clean, noise, t, scheduler)
    output.requires_grad_()
    hybrid_loss(output, clean, noisy, noise, t, scheduler).vb.sum().backward()
    assert not output.grad[:, :2].any()
    assert output.grad[:, 2:].flatten(1).any(1).all()
    output.grad = None
    hybrid_loss(output, clean, noisy, noise, t, scheduler).mse.sum().backward()
    assert output.grad[:, :2].any() and not output.grad[:, 2:].any()


@pytest.mark.parametrize("t", [0, 1, 999])
def test_a_hopeless_prediction_still_has_a_finite_loss_and_gradient(t):
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, steps = case([t, t])
    output = (100 * output).requires_grad_()
    noisy = add_noise(clean, noise, steps, scheduler)
    output = torch.cat([output[:, :2], output[:, 2:] / 100], 1)
    output.retain_grad()
    loss = hybrid_loss(output, clean, noisy, noise, steps, scheduler).loss
    loss.sum().backward()
    assert loss.isfinite().all() and output.grad.isfinite().all()


def test_bfloat16_outputs_are_reduced_in_float32():
    scheduler = DDPMScheduler(**DIFFUSION)
    output, clean, noise, t = case([3, 300])
    noisy = add_noise(clean, noise, t, scheduler)
    half = output.bfloat16()
    got = hybrid_loss(half, clean, noisy, noise, t, scheduler)
    expected = hybrid_loss(half.float(), clean, noisy, noise, t, scheduler)
    assert got.loss.dtype == torch.float32 and torch.equal(got.loss, expected.loss)


def test_an_output_without_variance_and_another_kind_of_prediction_are_refused():
    output, clean, noise, t = case([3])
    with pytest.raises(ValueError, match=r"twice its 2 channels \(noise and variance\), got \[1, 2, 4, 4\]"):
        predict(output[:, :2], clean, t, DDPMScheduler(**DIFFUSION))
    with pytest.raises(ValueError, match="prediction_type must be 'epsilon', got 'v_prediction'"):
        predict(output, clean, t, DDPMScheduler(**DIFFUSION, prediction_type="v_prediction"))
