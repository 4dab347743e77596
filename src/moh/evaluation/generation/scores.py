"""The scores of generated images: Frechet and kernel distances, inception score, precision and recall, named for what they are.

Kernel distance: Binkowski et al. 2018; inception score: Salimans et al. 2016; precision and recall: Kynkaanniemi et al. 2019,
all as torch-fidelity computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from moh.evaluation.generation.features import FeatureExtractor, ImageFeatures, extract_features
from moh.evaluation.generation.frechet import gaussian_frechet_distance, small_sample_note
from moh.evaluation.generation.images import ImageDataset, open_images
from moh.evaluation.generation.statistics import reference_features

_SPLIT = 5000
"""Images per part; the inception score is the mean over parts, as in the ADM suite."""

_SUBSETS, _SUBSET_SIZE = 100, 1000  # of images, over which the kernel distance is averaged: the usual numbers
_NEIGHBOURS = 3
_DISTANCE_BATCH = 1000
"""Rows of the distance matrix at a time: 0.4 GB for 50,000 samples."""


@dataclass(frozen=True)
class GenerationScores:
    """How close generated images are to reference images. `None`: could not be computed; `notes` gives the reason.

    Attributes:
        extractor: name of the model whose features were compared.
        is_fid: whether `frechet_distance` is FID, `spatial_frechet_distance` sFID, `kernel_distance` KID and
            `class_score` the inception score; if not, they are the same statistics of another model's features and not
            comparable.
        frechet_distance, spatial_frechet_distance, kernel_distance: lower is better. The last is unbiased, hence also for
            few images, and slightly below 0 for equal distributions.
        kernel_distance_std: standard deviation over subsets of the images.
        class_score: exp of the mean information that an image gives about its class; higher is better.
        class_score_std: standard deviation over parts of 5,000 images; NaN for a single part.
        precision: share of samples inside the manifold of the reference images.
        recall: share of reference images inside the manifold of the samples.
        samples, reference: number of images; None for statistics that do not state it.
        notes: what a reader of the numbers must know.
    """

    extractor: str
    is_fid: bool
    frechet_distance: float
    spatial_frechet_distance: float | None
    kernel_distance: float | None
    kernel_distance_std: float | None
    class_score: float | None
    class_score_std: float | None
    precision: float | None
    recall: float | None
    samples: int
    reference: int | None
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name of `frechet_distance`; states if it is not comparable with FID."""
        return "FID" if self.is_fid else f"Frechet distance on features of {self.extractor}, not comparable with FID"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: scores other than the published ones have other names, and NaN is None."""
        names = (
            ("fid", "sfid", "kid", "kid_std", "inception_score", "inception_score_std", "precision", "recall")
            if self.is_fid
            else ("frechet_distance", "spatial_frechet_distance", "kernel_distance", "kernel_distance_std",
                  "classifier_score", "classifier_score_std", "classifier_precision", "classifier_recall")
        )  # fmt: skip
        std = self.class_score_std if self.class_score_std is None or math.isfinite(self.class_score_std) else None
        values = (self.frechet_distance, self.spatial_frechet_distance, self.kernel_distance, self.kernel_distance_std,
                  self.class_score, std, self.precision, self.recall)  # fmt: skip
        return {
            "label": self.label, "features": self.extractor, **dict(zip(names, values, strict=True)),
            "samples": self.samples, "reference": self.reference, "notes": list(self.notes),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people: one line per score, then the notes."""
        other = "" if self.is_fid else f" on features of {self.extractor}"
        rows = [
            (self.label, self.frechet_distance, ".5g"),
            ("sFID" if self.is_fid else f"spatial Frechet distance{other}, not comparable with sFID",
             self.spatial_frechet_distance, ".5g"),
            ("KID" if self.is_fid else f"kernel distance{other}, not comparable with KID", self.kernel_distance, ".5g"),
            ("inception score" if self.is_fid else f"class score{other}, not comparable with the inception score",
             self.class_score, ".5g"),
            (f"precision{other}", self.precision, ".4f"),
            (f"recall{other}", self.recall, ".4f"),
        ]  # fmt: skip
        count = "a reference of unknown size" if self.reference is None else f"{self.reference:,} reference images"
        lines = [f"{name}: {value:{spec}}" for name, value, spec in rows if value is not None]
        return [*lines, f"{self.samples:,} samples, {count}", *(f"note: {note}" for note in self.notes)]


def score_images(
    samples: str | Path | ImageDataset,
    reference: str | Path | ImageDataset | ImageFeatures,
    extractor: FeatureExtractor,
    *,
    size: int | None = None,
    batch_size: int = 50,
    progress: bool = True,
) -> GenerationScores:
    """Score generated images against reference images.

    Args:
        samples: a directory, an `.npz` file or a Dataset, as for `open_images`.
        reference: the same; or statistics, as for or from `reference_features`.
        extractor: `InceptionFeatures` for FID and the other published scores, or `ClassifierFeatures`.
        size: crop the middle square of each image and resize it; None leaves them unchanged.
        batch_size: images per forward pass.
        progress: show progress bars (only on a terminal).

    Raises:
        ValueError: as from `open_images`, `extract_features` and `reference_features`; or 3 images or fewer on a side.
    """
    if not isinstance(reference, ImageFeatures):
        reference = reference_features(reference, extractor, size=size, batch_size=batch_size, progress=progress)
    images = open_images(samples, channels=extractor.channels, size=size)
    return compare(extract_features(images, extractor, batch_size=batch_size, progress=progress), reference, extractor)


def compare(samples: ImageFeatures, reference: ImageFeatures, extractor: FeatureExtractor) -> GenerationScores:
    """The scores from `extractor`'s features; `samples` must hold the features themselves, not only statistics.

    Raises:
        ValueError: `samples` holds no features, a set has 3 images or fewer, or the features' sizes differ.
    """
    if samples.features is None:
        raise ValueError(f"samples must be images, but {samples.name} holds only statistics")
    notes = _size_notes(samples, reference)
    spatial = kernel = kernel_std = score = spread = precision = recall = None
    if samples.spatial is None:
        notes.append(f"no spatial distance: {extractor.name} has no feature map")
    elif reference.spatial is None:
        notes.append("no spatial distance: the reference has no spatial statistics")
    else:
        spatial = gaussian_frechet_distance(samples.spatial, reference.spatial)
    if samples.logits is None:
        notes.append(f"no class score: {extractor.name} has no classes")
    else:
        score, spread = inception_score(samples.logits)
    if reference.features is None:
        notes.append("no kernel distance, precision and recall: the reference has only statistics")
    else:
        kernel, kernel_std = kernel_distance(samples.features, reference.features)
        device = extractor.device if extractor.device.type == "cuda" else "cpu"  # others lack float64
        precision, recall = precision_recall(samples.features.to(device), reference.features.to(device))
    return GenerationScores(
        extractor=extractor.name,
        is_fid=extractor.is_fid,
        frechet_distance=gaussian_frechet_distance(samples.gaussian, reference.gaussian),
        spatial_frechet_distance=spatial,
        kernel_distance=kernel,
        kernel_distance_std=kernel_std,
        class_score=score,
        class_score_std=spread,
        precision=precision,
        recall=recall,
        samples=len(samples.features),
        reference=reference.gaussian.count,
        notes=tuple(notes),
    )


def _size_notes(samples: ImageFeatures, reference: ImageFeatures) -> list[str]:
    notes = []
    if samples.image_size and reference.image_size and samples.image_size != reference.image_size:
        sizes = ["x".join(map(str, size)) for size in (samples.image_size, reference.image_size)]
        notes.append(f"samples are {sizes[0]}, reference images {sizes[1]}")
    for what, gaussian in (("samples", samples.gaussian), ("reference", reference.gaussian)):
        if gaussian.count is not None:
            note = small_sample_note(gaussian.count, len(gaussian.mean), what)
            notes += [note] if note is not None else []
    return notes


def inception_score(logits: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) over parts of 5,000 images of exp(E[KL(p(class | image) || p(class))]).

    The images are shuffled first, in a fixed order: a part of images sorted by class would hold few classes.

    Args:
        logits: `[n, classes]`, of any floating dtype; log probabilities work too.

    Returns:
        The mean, between 1 and the number of classes, and the standard deviation, NaN for a single part.

    Raises:
        ValueError: `logits` is not `[n, classes]` with n >= 1, or not finite.
    """
    if logits.ndim != 2 or 0 in logits.shape or not logits.isfinite().all():
        raise ValueError(f"logits must be finite and [n, classes] with n >= 1, got {tuple(logits.shape)}")
    parts = -(-len(logits) // _SPLIT)
    safe = logits.detach().cpu().double().log_softmax(1).clamp(min=-700)  # exp(-700) > 0: no 0 * log 0
    result = isc_features_to_metric(safe, splits=parts)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD] if parts > 1 else math.nan


def kernel_distance(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) over 100 random subsets of the squared maximum mean discrepancy, of a cubic kernel.

    With features of FID's network it is KID. Subsets have 1,000 images of each set, or as many as the smaller set.

    Args:
        samples: `[n, d]` features of generated images.
        reference: `[m, d]`.

    Raises:
        ValueError: the shapes are not `[n, d]` and `[m, d]` with n and m above 1.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != samples.shape[1]:
            raise ValueError(f"{name} must be [n, d] with n at least 2 and the same d, got {tuple(features.shape)}")
    size = min(_SUBSET_SIZE, len(samples), len(reference))
    options = {"kid_subsets": _SUBSETS, "kid_subset_size": size, "verbose": False}
    result = kid_features_to_metric(samples.detach(), reference.detach(), **options)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


@torch.no_grad()
def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """(precision, recall): the share of one set inside the other's manifold.

    The manifold of a set is the union of the balls around its points, each up to the point's third neighbour.

    Args:
        samples: `[n, d]` features of generated images.
        reference: `[m, d]`, on the same device.

    Raises:
        ValueError: the shapes are not `[n, d]` and `[m, d]` with n and m above 3.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) <= _NEIGHBOURS or features.shape[1] != samples.shape[1]:
            raise ValueError(
                f"{name} must be [n, d] with n at least {_NEIGHBOURS + 1} and the same d, got {tuple(features.shape)}"
            )
    precision, recall = calculate_precision_recall_part(
        samples.double(), reference.double(), neighborhood=_NEIGHBOURS, batch_size=_DISTANCE_BATCH
    )
    return float(precision), float(recall)
