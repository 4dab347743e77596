"""Reference statistics on disk: our safetensors files, and the `.npz` files of the ADM suite and others.

With a file of statistics the reference images need not be read again. Samples always need their images.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moh._files import replacing_file
from moh.evaluation.generation.features import FeatureExtractor, ImageFeatures, extract_features
from moh.evaluation.generation.frechet import Gaussian
from moh.evaluation.generation.images import ImageDataset, open_images

_FORMAT = "moh image features 1"


def reference_features(
    source: str | Path | ImageDataset,
    extractor: FeatureExtractor,
    *,
    size: int | None = None,
    batch_size: int = 50,
    progress: bool = True,
) -> ImageFeatures:
    """Features or statistics of the reference.

    Args:
        source: images, as for `open_images`; a `.safetensors` file of `save_features`; or an `.npz` file with `mu` and
            `sigma` of Inception features (`mu_s`, `sigma_s`: spatial ones). If it also has `arr_0`, mean and covariance
            are `mu` and `sigma`, as in the ADM suite, and the features of single images come from `arr_0`.
        extractor: `InceptionFeatures` or `ClassifierFeatures`.
        size, batch_size, progress: as for `open_images` and `extract_features`.

    Raises:
        ValueError: `source` can't be used, or holds statistics of another model.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and path.suffix == ".safetensors":
        return load_features(path, extractor)
    stored = _npz_statistics(path) if path is not None and path.is_file() and path.suffix == ".npz" else None
    if stored is None or not extractor.is_fid:
        if stored is not None and not stored.has_images:
            raise ValueError(
                f"{path} holds only statistics of Inception features, which can't be compared with features of "
                f"{extractor.name}; give images as the reference"
            )
        images = open_images(source, channels=extractor.channels, size=size)
        return extract_features(images, extractor, batch_size=batch_size, progress=progress)
    features, image_size = None, None
    if stored.has_images:
        images = open_images(source, channels=extractor.channels, size=size)
        extracted = extract_features(images, extractor, batch_size=batch_size, progress=progress)
        features, image_size = extracted.features, extracted.image_size
    return ImageFeatures(str(path), stored.gaussian, stored.spatial, features, None, image_size)


def save_features(path: str | Path, features: ImageFeatures, extractor: FeatureExtractor) -> None:
    """Write features and statistics of a set of images, without its logits, and the model that they are from.

    Raises:
        ValueError: `path` does not end in `.safetensors`.
        OSError: it can't be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"statistics must be written to a file that ends in .safetensors, got {path}")
    tensors = {"mu": features.gaussian.mean, "sigma": features.gaussian.covariance}
    if features.spatial is not None:
        tensors |= {"mu_s": features.spatial.mean, "sigma_s": features.spatial.covariance}
    if features.features is not None:
        tensors["features"] = features.features
    counts = [features.gaussian.count, features.spatial.count if features.spatial is not None else None]
    about = {
        "name": features.name, "counts": counts, "image_size": features.image_size,
        "extractor": extractor.name, "fingerprint": extractor.fingerprint,
    }  # fmt: skip
    with replacing_file(target) as file:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, file, metadata={"format": _FORMAT, "about": json.dumps(about)})


def load_features(path: str | Path, extractor: FeatureExtractor) -> ImageFeatures:
    """Read a file of `save_features`.

    Raises:
        ValueError: it is not such a file, or was made with another model, or other weights, than `extractor`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dictionary
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read as a file of statistics: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a file of image statistics as written by --save-reference")
    about = json.loads(metadata["about"])
    if about["fingerprint"] != extractor.fingerprint:
        other = "the same model with other weights" if about["extractor"] == extractor.name else f"{about['extractor']}"
        raise ValueError(f"{path} holds features of {other}, but the samples are compared with {extractor.name}")
    count, spatial_count = about["counts"]
    size = about["image_size"]
    return ImageFeatures(
        name=about["name"],
        gaussian=Gaussian(tensors["mu"], tensors["sigma"], count),
        spatial=Gaussian(tensors["mu_s"], tensors["sigma_s"], spatial_count) if "mu_s" in tensors else None,
        features=tensors.get("features"),
        logits=None,
        image_size=None if size is None else (size[0], size[1]),
    )


class _NpzStatistics:
    """The statistics in an `.npz` file."""

    def __init__(self, path: Path, arrays: Mapping[str, Tensor], has_images: bool) -> None:
        self.has_images = has_images
        try:
            self.gaussian = Gaussian(arrays["mu"], arrays["sigma"], None)
            self.spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"], None) if "mu_s" in arrays else None
        except (KeyError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"the statistics in {path} can't be used: {reason}") from None


def _npz_statistics(path: Path) -> _NpzStatistics | None:
    """The statistics in a file, or None if it has none."""
    try:
        with np.load(path, allow_pickle=False) as file:  # arrays are read on access
            if "mu" not in file:
                return None
            names = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file]
            arrays = {name: torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in names}
            return _NpzStatistics(path, arrays, "arr_0" in file)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{path} can't be read as an .npz file: {error}") from None
