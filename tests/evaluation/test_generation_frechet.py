"""Promise: the Frechet distance follows its definition, also if the covariances are singular."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from moh.evaluation.generation import Gaussian, frechet_distance, gaussian_frechet_distance
from moh.evaluation.generation.frechet import GaussianAccumulator, small_sample_note


def gaussian(mean: list[float], covariance: torch.Tensor) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), covariance.double(), None)


def rotation(angle: float) -> torch.Tensor:
    c, s = torch.cos(torch.tensor(angle).double()), torch.sin(torch.tensor(angle).double())
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


def test_commuting_covariances_have_the_closed_form() -> None:
    axes = rotation(0.6)
    a = gaussian([1.0, 2.0], axes @ torch.diag(torch.tensor([4.0, 9.0]).double()) @ axes.T)
    b = gaussian([4.0, -2.0], axes @ torch.diag(torch.tensor([1.0, 25.0]).double()) @ axes.T)
    # |(3, -4)|^2 + (2 - 1)^2 + (3 - 5)^2
    assert gaussian_frechet_distance(a, b) == pytest.approx(25 + 1 + 4, rel=1e-12)


def test_covariances_that_do_not_commute_have_the_closed_form() -> None:
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = rotation(1.0) @ torch.diag(torch.tensor([3.0, 0.2]).double()) @ rotation(1.0).T
    # tr sqrt(M) of a 2 x 2 matrix M: sqrt(tr M + 2 sqrt(det M))
    cross = (torch.trace(a @ b) + 2 * torch.sqrt(torch.det(a @ b))).sqrt()
    expected = float(a.trace() + b.trace() - 2 * cross)
    assert gaussian_frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-12)


def test_directions_without_variance_count_in_full() -> None:
    flat = gaussian([0, 0], torch.diag(torch.tensor([4.0, 0.0])))
    upright = gaussian([0, 0], torch.diag(torch.tensor([0.0, 9.0])))
    point = gaussian([3, 4], torch.zeros(2, 2))
    assert gaussian_frechet_distance(flat, upright) == pytest.approx(13)
    assert gaussian_frechet_distance(flat, point) == pytest.approx(29)
    assert gaussian_frechet_distance(point, point) == 0


@pytest.mark.parametrize("count", [500, 30], ids=["many", "fewer-than-features"])
@pytest.mark.filterwarnings("ignore:features_")
def test_equal_sets_are_at_zero_and_the_order_does_not_matter(count: int) -> None:
    a = torch.randn(count, 40) * torch.logspace(-3, 2, 40)
    b = torch.randn(count, 40) + 0.5
    assert frechet_distance(a, a.clone()) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_agrees_with_the_library(dtype: torch.dtype) -> None:
    a = (torch.randn(400, 12, dtype=dtype) @ torch.randn(12, 12, dtype=dtype)).relu()
    b = (torch.randn(300, 12, dtype=dtype) @ torch.randn(12, 12, dtype=dtype)).relu() + 0.3
    statistics = [fid_features_to_statistics(x.double()) for x in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_batches_give_what_all_at_once_gives_even_far_from_zero() -> None:
    features = (1e4 + torch.randn(101, 5)).double()  # sums of squares would lose the variance in float32
    accumulator = GaussianAccumulator()
    for batch in features.split((1, 0, 60, 40)):
        accumulator.update(batch)
    result = accumulator.result()
    assert result.count == 101
    torch.testing.assert_close(result.mean, features.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.covariance, features.T.cov(), rtol=1e-8, atol=1e-10)


def test_small_sets_are_told_and_large_ones_are_not() -> None:
    with pytest.warns(UserWarning, match=r"features_b: 10 images give a singular covariance of 10 features"):
        frechet_distance(torch.randn(50, 10), torch.randn(10, 10))
    with pytest.warns(UserWarning, match=r"features_a: only 49 images for 10 features"):
        frechet_distance(torch.randn(49, 10), torch.randn(50, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(torch.randn(50, 10), torch.randn(50, 10))
    assert small_sample_note(50_000, 2048, "samples") is None
    assert "only 10000 images for 2048" in str(small_sample_note(10_000, 2048, "samples"))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(4), torch.zeros(4, 2), r"features_a: features must be \[n, 4\], got \(4,\)"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "the features must have the same size, got 2 and 3"),
        (torch.ones(9, 2), torch.full((9, 2), torch.nan), "features_b: features must be finite"),
        (torch.ones(1, 2), torch.ones(9, 2), "features_a: a covariance needs at least 2 features, got 1"),
    ],
    ids=["one-dimension", "other-size", "nan", "one-image"],
)
@pytest.mark.filterwarnings("ignore:features_")
def test_unusable_features_are_told(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_what_is_no_gaussian_is_told() -> None:
    identity = gaussian([0, 0], torch.eye(2))
    with pytest.raises(ValueError, match=r"no negative eigenvalues, got -0\.1"):
        gaussian_frechet_distance(identity, gaussian([0, 0], torch.diag(torch.tensor([1.0, -0.1]))))
    with pytest.raises(ValueError, match=r"\[d\] and \[d, d\] with d >= 1, got \(2,\) and \(3, 3\)"):
        gaussian([0, 0], torch.eye(3))
    with pytest.raises(ValueError, match="must be finite"):
        gaussian([0, float("inf")], torch.eye(2))
    rounding = torch.diag(torch.tensor([1.0, -1e-7]))  # a covariance stored in float32 may have this
    assert gaussian_frechet_distance(identity, gaussian([0, 0], rounding)) == pytest.approx(1)
