"""Promise: scores are those of their definitions and of the library, and have true names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from generation_cases import TinyExtractor, random_images, write_npz, write_pngs
from torch_fidelity import FeatureExtractorBase

from moh.evaluation.generation import (
    compare,
    extract_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_features,
    open_images,
    precision_recall,
    reference_features,
    save_features,
    score_images,
)


class Inception(TinyExtractor):
    name, is_fid = "Inception-v3", True


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """120 samples, darker than the 150 reference images."""
    return random_images(120, seed=1, bright=200), random_images(150, seed=2)


class LibraryTiny(FeatureExtractorBase):
    """`TinyExtractor` in the library's interface."""

    def __init__(self, name, features_list, **kwargs) -> None:
        super().__init__(name, features_list)
        self.tiny = TinyExtractor()

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, x):
        found = self.tiny(x)
        every = {"features": found.features, "logits": found.logits}
        return tuple(every[name] for name in self.features_list)


def test_all_scores_agree_with_the_librarys_on_the_same_features(sets, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY, "tiny", LibraryTiny)
    folders = [write_pngs(tmp_path / name, images) for name, images in zip("ab", sets, strict=True)]
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), feature_extractor="tiny", fid=True, isc=True, prc=True, kid=True,
        kid_subset_size=120, isc_splits=1, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    found = score_images(folders[0], folders[1], TinyExtractor(), progress=False)
    assert found.frechet_distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)  # float32 there
    kid = (expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"])
    assert (found.kernel_distance, found.kernel_distance_std) == pytest.approx(kid, rel=1e-3)
    assert found.class_score == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_the_spatial_distance_is_that_of_the_spatial_features(sets) -> None:
    extractor = TinyExtractor()
    scores = score_images(*sets, extractor, progress=False)
    expected = frechet_distance(extractor(sets[0]).spatial, extractor(sets[1]).spatial)
    assert scores.spatial_frechet_distance == pytest.approx(expected, rel=1e-5)


def test_the_batch_size_changes_nothing_and_bounds_the_batches(sets) -> None:
    results = []
    for batch_size in (7, 150):
        extractor = TinyExtractor()
        scores = score_images(*sets, extractor, batch_size=batch_size, progress=False)
        results.append((scores.frechet_distance, scores.spatial_frechet_distance, scores.class_score, scores.recall))
        assert max(extractor.batches) == batch_size and sum(extractor.batches) == 270
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_same_images_are_perfect(sets) -> None:
    scores = score_images(sets[0], sets[0], TinyExtractor(), progress=False)
    assert scores.frechet_distance == pytest.approx(0, abs=1e-9)
    assert (scores.precision, scores.recall) == (1, 1)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 4.0),
        ([[0.1, 0.2, 0.3, 0.4]] * 6, 1.0),
        ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], 2.0),
        ([[1, 0, 0], [0, 1, 0]], 2.0),
        ([[0.9, 0.1], [0.3, 0.7]], math.exp((0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
                                            + 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)) / 2)),
    ],
    ids=["certain-and-diverse", "all-alike", "two-groups", "a-class-never-seen", "by-hand"],
)  # fmt: skip
def test_the_inception_score_of_known_probabilities(probabilities: list[list[float]], expected: float) -> None:
    for smallest in (1e-40, 0.0):  # logits of zero probability: -92, and the end of float32's range
        p = torch.tensor(probabilities, dtype=torch.float64).clamp(min=smallest)
        mean, std = inception_score(p.log().clamp(min=-1e30))
        assert mean == pytest.approx(expected, rel=1e-9) and math.isnan(std)


def test_the_inception_score_is_a_mean_over_parts_of_5000() -> None:
    logits = torch.randn(5001, 3) * 2
    mean, std = inception_score(logits)
    whole, _ = inception_score(logits[:5000])
    assert mean == pytest.approx(whole, rel=0.05) and mean != whole and 0 < std < 0.2
    assert inception_score(logits) == (mean, std)  # its order is fixed


def test_classes_in_order_do_not_lower_the_inception_score() -> None:
    logits = 20.0 * torch.eye(2).repeat_interleave(5000, 0)  # in this order a part of 5,000 would hold one class
    assert inception_score(logits)[0] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("logits", [torch.zeros(0, 3), torch.zeros(3), torch.full((2, 2), torch.nan)], ids=str)
def test_logits_that_give_no_score_are_told(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits must be finite and"):
        inception_score(logits)


def test_the_kernel_distance_does_not_depend_on_the_number_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1200, 4, generator=generator) for _ in range(2))
    values = [kernel_distance(a[:count], b[:count] + 1)[0] for count in (100, 1200)]
    assert values[0] == pytest.approx(values[1], rel=0.3) and values[1] > 1  # a Frechet distance would be biased
    same, spread = kernel_distance(a, b)
    assert abs(same) < 3 * spread and spread > 0


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4)), ((5,), (5, 3))])
def test_sets_without_a_kernel_distance_are_named(shapes) -> None:
    with pytest.raises(ValueError, match=r"must be \[n, d\] with n at least 2 and the same d"):
        kernel_distance(*(torch.zeros(shape) for shape in shapes))


def test_precision_and_recall_of_sets_made_by_hand() -> None:
    line = torch.arange(8.0)[:, None]  # each third neighbour is 2 or 3 away
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(line + 100, line) == (0, 0)
    # one mode of two: precise, but half of the reference is out of reach
    two_modes = torch.cat([line, line + 100])
    assert precision_recall(line, two_modes) == (1, 0.5)
    assert precision_recall(two_modes, line) == (0.5, 1)
    # the reference's balls end at -3 and 10; the samples' balls, of radius 6 or 4, cover everything above -4.5
    samples = torch.tensor([[-3.0], [-3.5], [10.0], [10.5]])
    precision, recall = precision_recall(samples, line)
    assert precision == 0.5 and recall == 1


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), r"samples must be .* at least 4 .*got \(3, 2\)"),
        (torch.zeros(9, 2), torch.zeros(3, 2), r"reference must be .*got \(3, 2\)"),
        (torch.zeros(9, 2), torch.zeros(9, 3), r"reference must be .*got \(9, 3\)"),
    ],
    ids=["few-samples", "small-reference", "other-features"],
)
def test_sets_without_a_manifold_are_told(samples, reference, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision_recall(samples, reference)


@pytest.mark.parametrize("is_fid", [False, True], ids=["classifier", "inception"])
def test_every_output_says_what_the_numbers_are(sets, is_fid: bool) -> None:
    scores = score_images(*sets, Inception() if is_fid else TinyExtractor(), progress=False)
    lines, data = scores.lines(), scores.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["samples"] == 120 and data["reference"] == 150
    assert lines[6] == "120 samples, 150 reference images"
    if is_fid:
        assert [line.split(":")[0] for line in lines[:6]] == [
            "FID", "sFID", "KID", "inception score", "precision", "recall"]  # fmt: skip
        assert data["kid"] == scores.kernel_distance
        assert data["fid"] == scores.frechet_distance and data["label"] == "FID"
    else:
        assert lines[0] == (
            f"Frechet distance on features of tiny, not comparable with FID: {scores.frechet_distance:.5g}"
        )
        assert all("on features of tiny" in line for line in lines[:6])
        assert data["label"] == "Frechet distance on features of tiny, not comparable with FID"
        assert data["frechet_distance"] == scores.frechet_distance
        assert not {"fid", "sfid", "kid", "inception_score", "precision", "recall"} & set(data)


def test_few_images_and_different_sizes_are_noted(sets) -> None:
    scores = score_images(sets[0][:6], sets[1][:20], TinyExtractor(), progress=False)
    assert any(note.startswith("samples: 6 images give a singular covariance of 6") for note in scores.notes)
    assert any(note.startswith("reference: only 20 images for 6 features") for note in scores.notes)
    assert f"note: {scores.notes[0]}" in scores.lines()
    assert not score_images(*sets, TinyExtractor(), progress=False).notes
    extractor = TinyExtractor()
    wide = extract_features(open_images(sets[1].repeat(1, 1, 2, 1)[:, :, 4:12]), extractor, progress=False)
    assert not compare(wide, wide, extractor).notes


def test_images_of_another_size_than_the_reference_are_noted(sets) -> None:
    class Flexible(TinyExtractor):
        def __call__(self, images):
            return super().__call__(images[..., :8, :8])

    scores = score_images(sets[0].repeat(1, 1, 1, 2), sets[1], Flexible(), progress=False)
    assert scores.notes == ("samples are 8x16, reference images 8x8",)


def test_a_model_without_map_and_classes_still_gives_the_rest(sets) -> None:
    class Bare(TinyExtractor):
        def __call__(self, images):
            return super().__call__(images)._replace(spatial=None, logits=None)

    scores = score_images(*sets, Bare(), progress=False)
    assert scores.notes == ("no spatial distance: tiny has no feature map", "no class score: tiny has no classes")
    assert scores.spatial_frechet_distance is None and scores.class_score is None
    assert len(scores.lines()) == 4 + 1 + 2 and scores.to_dict()["classifier_score"] is None


def test_saved_statistics_serve_like_the_images(sets, tmp_path: Path) -> None:
    extractor = TinyExtractor()
    reference = reference_features(sets[1], extractor, progress=False)
    save_features(tmp_path / "reference.safetensors", reference, extractor)
    again = score_images(sets[0], tmp_path / "reference.safetensors", extractor, progress=False)
    assert again.to_dict() == score_images(sets[0], sets[1], extractor, progress=False).to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]


def test_statistics_of_another_model_are_refused(sets, tmp_path: Path) -> None:
    class Retrained(TinyExtractor):
        fingerprint = "f" * 16

    file = tmp_path / "reference.safetensors"
    extractor = TinyExtractor()
    save_features(file, reference_features(sets[1], extractor, progress=False), extractor)
    with pytest.raises(ValueError, match="holds features of the same model with other weights, but"):
        load_features(file, Retrained())
    other = Inception()
    other.fingerprint = "e" * 16
    with pytest.raises(ValueError, match="features of tiny, but the samples are compared with Inception-v3"):
        load_features(file, other)
    with pytest.raises(ValueError, match=r"ends in .safetensors, got .*reference.npz"):
        save_features(tmp_path / "reference.npz", load_features(file, extractor), extractor)


@pytest.mark.parametrize("content", ["text", "weights"])
def test_a_safetensors_file_of_other_things_is_told(tmp_path: Path, content: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    save_file({"mu": torch.zeros(2)}, file) if content == "weights" else file.write_text("hello")
    with pytest.raises(ValueError, match=r"a.safetensors (is not a file of image statistics|can't be read)"):
        load_features(file, TinyExtractor())


def statistics(features: torch.Tensor, suffix: str = "") -> dict[str, np.ndarray]:
    wide = features.double().numpy()
    return {f"mu{suffix}": wide.mean(0), f"sigma{suffix}": np.cov(wide, rowvar=False)}


def test_a_reference_batch_of_the_adm_suite_serves(sets, tmp_path: Path) -> None:
    extractor = Inception()
    everything = extractor(random_images(400, seed=2))  # its statistics come from more images than it holds
    stored = statistics(everything.features) | statistics(everything.spatial, "_s")
    file = write_npz(tmp_path / "reference.npz", sets[1], **stored)
    scores = score_images(sets[0], file, extractor, progress=False)
    samples = extractor(sets[0])
    assert scores.frechet_distance == pytest.approx(frechet_distance(samples.features, everything.features), rel=1e-5)
    expected = frechet_distance(samples.spatial, everything.spatial)
    assert scores.spatial_frechet_distance == pytest.approx(expected, rel=1e-5)
    images_alone = score_images(*sets, extractor, progress=False)
    assert (scores.precision, scores.recall) == (images_alone.precision, images_alone.recall)
    assert scores.reference is None and "a reference of unknown size" in scores.lines()[6]
    # its statistics are for other features: only the images are used
    other = score_images(sets[0], file, TinyExtractor(), progress=False)
    assert other.frechet_distance == pytest.approx(images_alone.frechet_distance)


def test_a_reference_of_statistics_alone_gives_the_distance_alone(sets, tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", **statistics(Inception()(sets[1]).features))
    scores = score_images(sets[0], tmp_path / "stats.npz", Inception(), progress=False)
    assert scores.frechet_distance == pytest.approx(
        score_images(*sets, Inception(), progress=False).frechet_distance, rel=1e-5
    )
    assert scores.spatial_frechet_distance is None and scores.precision is None and scores.recall is None
    assert scores.kernel_distance is None
    assert scores.notes == (
        "no spatial distance: the reference has no spatial statistics",
        "no kernel distance, precision and recall: the reference has only statistics",
    )
    with pytest.raises(
        ValueError, match="only statistics of Inception features, which can't be compared with features of"
    ):
        score_images(sets[0], tmp_path / "stats.npz", TinyExtractor(), progress=False)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(6)}, "it lacks 'sigma'"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"got \(6,\) and \(5, 5\)"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, "the features must have the same size, got 6 and 4"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "must be finite"),
    ],
    ids=["no-sigma", "shapes", "other-size", "nan"],
)
def test_statistics_that_cannot_be_used_are_told(sets, tmp_path: Path, arrays, message: str) -> None:
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        score_images(sets[0], tmp_path / "stats.npz", Inception(), progress=False)


def test_features_that_are_not_finite_are_told(sets) -> None:
    class Broken(TinyExtractor):
        def __call__(self, images):
            return super().__call__(images)._replace(features=torch.full((len(images), 6), torch.nan))

    with pytest.raises(ValueError, match="Tensor, features of tiny: features must be finite"):
        score_images(*sets, Broken(), progress=False)


def test_options_out_of_range_and_too_few_images_are_told(sets) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_images(*sets, TinyExtractor(), batch_size=0, progress=False)
    with pytest.raises(ValueError, match="Tensor: scores need at least 2 images, got 1"):
        score_images(sets[0][:1], sets[1], TinyExtractor(), progress=False)
    reference = reference_features(sets[1], TinyExtractor(), progress=False)
    without = type(reference)(reference.name, reference.gaussian, None, None, None, None)
    with pytest.raises(ValueError, match="samples must be images, but Tensor holds only statistics"):
        compare(without, reference, TinyExtractor())
