"""The hybrid loss of diffusion models that learn their variances (arXiv 2102.09672, section 3.1, L_simple + L_vlb).

The schedule is a diffusers scheduler's; added here are posteriors of a whole batch and the terms of the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PIXEL = 1 / 255
"""Half the distance between neighbouring 8-bit values, scaled to -1..1."""

_LEAST_PROBABILITY = 1e-12  # keeps the logarithm finite far from the mean


@dataclass(frozen=True)
class HybridLoss:
    """Loss per image, `[B]` float32.

    Attributes:
        mse: mean squared error of the noise.
        vb: the step's term of the variational bound, in bits per dimension; its gradient goes to the variance alone.
        loss: their sum.
    """

    mse: Tensor
    vb: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for the step from t to t - 1: `p(x_{t-1} | x_t)`, a Gaussian. All `[B, C, h, w]` float32.

    Attributes:
        mean: its mean.
        log_variance: the logarithm of its variance.
        clean: the image or latent that the predicted noise implies.
    """

    mean: Tensor
    log_variance: Tensor
    clean: Tensor


def add_noise(clean: Tensor, noise: Tensor, t: Tensor, scheduler: Any) -> Tensor:
    """`x_t` `[B, C, h, w]` float32 of `q(x_t | x_0)`; arguments as in `hybrid_loss`.

    Like `scheduler.add_noise`, in higher precision: in the first steps its coefficients have too few digits for the
    bound, whose terms are differences of almost equal means.
    """
    kept = _schedule(scheduler)[2]
    return _at(t, kept.sqrt()) * clean.float() + _at(t, (1 - kept).sqrt()) * noise.float()


def hybrid_loss(output: Tensor, clean: Tensor, noisy: Tensor, noise: Tensor, t: Tensor, scheduler: Any) -> HybridLoss:
    """Loss of predicting the noise and the variance.

    The bound's term is the divergence of `p(x_{t-1} | x_t)` from `q(x_{t-1} | x_t, x_0)`, and for t = 0 the likelihood of
    8-bit values, unscaled.

    Args:
        output: `[B, 2C, h, w]` of the model: noise, then the position of each variance between its bounds, -1 to 1.
        clean: `[B, C, h, w]`, images in -1..1 or latents.
        noisy: `[B, C, h, w]`, `add_noise(clean, noise, t, scheduler)`.
        noise: `[B, C, h, w]`.
        t: `[B]` int64, the time steps.
        scheduler: a diffusers scheduler with `betas` that predicts "epsilon".

    Raises:
        ValueError: the output's shape does not match, or the scheduler does not predict "epsilon".
    """
    prediction = predict(output, noisy, t, scheduler)
    clean, noise, predicted_noise = clean.float(), noise.float(), output[:, : noisy.shape[1]].float()
    mse = (noise - predicted_noise).square().flatten(1).mean(1)
    mean, log_variance = posterior(clean, noisy, t, scheduler)
    predicted_mean = prediction.mean.detach()
    divergence = _divergence(mean, log_variance, predicted_mean, prediction.log_variance)
    likelihood = _log_likelihood(clean, predicted_mean, prediction.log_variance)
    bound = torch.where((t == 0)[:, None, None, None], -likelihood, divergence)  # [B, C, h, w]
    vb = bound.flatten(1).mean(1) / math.log(2)
    return HybridLoss(mse=mse, vb=vb, loss=mse + vb)


def predict(output: Tensor, noisy: Tensor, t: Tensor, scheduler: Any) -> Prediction:
    """`p(x_{t-1} | x_t)` from a model's output, each image at its own step; arguments as in `hybrid_loss`.

    The log-variance is interpolated between those of `q(x_{t-1} | x_t, x_0)` and beta_t.
    """
    channels = noisy.shape[1]
    if output.shape != (noisy.shape[0], 2 * channels, *noisy.shape[2:]):
        raise ValueError(
            f"output must have the shape of noisy with twice its {channels} channels (noise and variance), "
            f"got {list(output.shape)} for {list(noisy.shape)}"
        )
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"scheduler.prediction_type must be 'epsilon', got {scheduler.config.prediction_type!r}")
    noise, where = output.float().split(channels, dim=1)
    noisy = noisy.float()
    betas, _, kept, _ = _schedule(scheduler)
    clean = _at(t, 1 / kept.sqrt()) * noisy - _at(t, (1 / kept - 1).sqrt()) * noise
    mean, least = posterior(clean, noisy, t, scheduler)
    share = (where + 1) / 2
    return Prediction(mean, share * _at(t, betas.log()) + (1 - share) * least, clean)


def posterior(clean: Tensor, noisy: Tensor, t: Tensor, scheduler: Any) -> tuple[Tensor, Tensor]:
    """Mean `[B, C, h, w]` and log-variance `[B, 1, 1, 1]` of `q(x_{t-1} | x_t, x_0)`, float32.

    At t = 0 the variance is 0; its logarithm is taken from t = 1.
    """
    betas, alphas, kept, kept_before = _schedule(scheduler)
    variance = betas * (1 - kept_before) / (1 - kept)
    of_clean = betas * kept_before.sqrt() / (1 - kept)
    of_noisy = (1 - kept_before) * alphas.sqrt() / (1 - kept)
    variance = torch.cat([variance[1:2], variance[1:]])
    return _at(t, of_clean) * clean.float() + _at(t, of_noisy) * noisy.float(), _at(t, variance.log())


def _schedule(scheduler: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta_t, alpha_t, and the products of the alphas up to t and up to t - 1: `[T]` float64.

    In float32 `1 - product` would lose four digits in the first steps.
    """
    betas = scheduler.betas.double().cpu()
    alphas = 1 - betas
    kept = alphas.cumprod(0)
    return betas, alphas, kept, torch.cat([kept.new_ones(1), kept[:-1]])


def _at(t: Tensor, values: Tensor) -> Tensor:
    """`values[t]` as `[B, 1, 1, 1]` float32 on t's device."""
    return values.float().to(t.device)[t][:, None, None, None]


def _divergence(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of Gaussians, in nats, elementwise."""
    difference = log_variance_q - log_variance_p
    return 0.5 * (difference.exp() - 1 - difference + (mean_q - mean_p).square() * (-log_variance_p).exp())


def _log_likelihood(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats, of 8-bit values in -1..1: the Gaussian's within half a step of each.

    The first and last values include the tail beyond them.
    """
    centred, scale = clean - mean, (-0.5 * log_variance).exp()
    below = torch.special.ndtr((_PIXEL + centred) * scale)
    above = torch.special.ndtr((_PIXEL - centred) * scale)
    # In the lower tail, where float32 is precise: near 1 the difference would lose its digits
    distance = centred.abs()
    within = torch.special.ndtr((_PIXEL - distance) * scale) - torch.special.ndtr((-_PIXEL - distance) * scale)
    probability = torch.where(clean < -0.999, below, torch.where(clean > 0.999, above, within))
    return probability.clamp_min(_LEAST_PROBABILITY).log()
