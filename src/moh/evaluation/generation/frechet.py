"""Frechet distance between the Gaussians of two sets of features (Heusel et al. 2017, equation 6), in float64.

d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

_NEGATIVE = 1e-4
"""Most negative eigenvalue of a covariance, as a share of the largest; float32 files reach about 1e-7."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features.

    Attributes:
        mean: `[d]`, float64, on the CPU.
        covariance: `[d, d]`, float64, on the CPU; unbiased.
        count: number of features it was computed from; None if a file does not state it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.covariance.shape != (d, d) or d == 0:
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"mean and covariance must be [d] and [d, d] with d >= 1, got {shapes}")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite, but they hold NaN or infinity")


class GaussianAccumulator:
    """Mean and covariance of features that arrive in batches; the features are not kept."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(0)
        self._scatter = torch.zeros(0)

    def update(self, features: Tensor) -> None:
        """Add `features` `[n, d]`, of any floating dtype and device.

        Raises:
            ValueError: `features` is not `[n, d]` with the d of earlier ones, or not finite.
        """
        d = self._mean.shape[0] if self._count else features.shape[-1]
        if features.ndim != 2 or features.shape[1] != d:
            raise ValueError(f"features must be [n, {d}], got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features must be finite, but they hold NaN or infinity")
        n = features.shape[0]
        if n == 0:
            return
        batch = features.detach().to("cpu", torch.float64)
        mean = batch.mean(0)  # [d]
        centred = batch - mean  # [n, d]
        if self._count == 0:
            self._mean, self._scatter = mean, centred.T @ centred
        else:  # pairwise update of Chan, Golub and LeVeque: no difference of large sums
            delta = mean - self._mean
            total = self._count + n
            self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self._count * n / total)
            self._mean += delta * (n / total)
        self._count += n

    def result(self) -> Gaussian:
        """The Gaussian of all features so far.

        Raises:
            ValueError: there were fewer than 2 features.
        """
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self._count}")
        return Gaussian(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance, as FID is, between Gaussians fitted to two sets of features.

    Args:
        features_a: `[n, d]`, of any floating dtype and device, such as the penultimate features of a classifier.
        features_b: `[m, d]`.

    Warns:
        UserWarning: a set is too small for its d; see `small_sample_note`.

    Raises:
        ValueError: the shapes are not `[n, d]` and `[m, d]`, a feature is not finite, or a set has fewer than 2.
    """
    gaussians = []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        accumulator = GaussianAccumulator()
        try:
            accumulator.update(features)
            gaussians.append(accumulator.result())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        note = small_sample_note(len(features), features.shape[1], name)
        if note is not None:
            warnings.warn(note, stacklevel=2)
    return gaussian_frechet_distance(*gaussians)


@torch.no_grad()
def gaussian_frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance between two Gaussians of the same d.

    With C_a = A A^T and C_b = B B^T, tr((C_a C_b)^(1/2)) is the sum of the singular values of A^T B. It is real, symmetric
    in a and b, and exact for singular covariances; the square root of the product C_a C_b is none of these.

    Raises:
        ValueError: their d differs, or a covariance has clearly negative eigenvalues.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features must have the same size, got {a.mean.numel()} and {b.mean.numel()}")
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))  # below 0 only by rounding


def small_sample_note(count: int, size: int, what: str) -> str | None:
    """A warning about a Frechet distance from `count` features of `size` numbers; None if they are enough."""
    if count <= size:
        return (
            f"{what}: {count} images give a singular covariance of {size} features; the distance is biased upwards "
            "and means little"
        )
    if count < 5 * size:
        return (
            f"{what}: only {count} images for {size} features; the distance is biased upwards, "
            "compare it only with values of as many images"
        )
    return None


def _factor(covariance: Tensor) -> Tensor:
    """`[d, r]` matrix L with L L^T = covariance, r its numerical rank."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)  # ascending
    largest = values[-1].clamp(min=0)
    if values[0] < -_NEGATIVE * largest or values[-1] < 0:
        raise ValueError(f"covariance must have no negative eigenvalues, got {float(values[0]):.3g}")
    keep = values > largest * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, keep] * values[keep].sqrt()
    return factor
