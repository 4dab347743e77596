"""Run a feature extractor (`classifier.py`) over images, batch by batch, and keep what the scores need."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moh.evaluation.generation.frechet import Gaussian, GaussianAccumulator
from moh.evaluation.generation.images import Images


class Extracted(NamedTuple):
    """An extractor's output for a batch.

    Attributes:
        features: `[B, d]` float, one vector per image.
        spatial: `[B, s]` float, a few channels of a feature map, flattened; None if the model has no map.
        logits: `[B, classes]` float; None if the model has no classes.
    """

    features: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class FeatureExtractor(Protocol):
    """Turns images into features.

    Attributes:
        name: the model's, for people.
        fingerprint: of its weights, see `weights_fingerprint`.
        is_fid: whether it is the network that defines FID, with the published weights.
        channels: channels of its images, 3 or 1.
        device: where it computes.
    """

    name: str
    fingerprint: str
    is_fid: bool
    channels: int
    device: torch.device

    def __call__(self, images: Tensor) -> Extracted:
        """Features of uint8 images `[B, channels, H, W]`."""
        ...


@dataclass(frozen=True)
class ImageFeatures:
    """Features and statistics of a set of images. `None`: unknown, as in a file that holds only statistics.

    Attributes:
        name: where the images came from.
        gaussian: mean and covariance of the features.
        spatial: mean and covariance of the spatial features.
        features: `[n, d]` float32 on the CPU, in the order of the images.
        logits: `[n, classes]` float32 on the CPU.
        image_size: (height, width) of the images.
    """

    name: str
    gaussian: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    logits: Tensor | None
    image_size: tuple[int, int] | None


@torch.no_grad()
def extract_features(
    images: Images, extractor: FeatureExtractor, *, batch_size: int = 50, progress: bool = True
) -> ImageFeatures:
    """Features of all images.

    Args:
        images: as `open_images` opens them, with `extractor.channels`.
        extractor: `InceptionFeatures` or `ClassifierFeatures`.
        batch_size: images per forward pass; affects results only by rounding.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: `batch_size` is below 1, there are fewer than 2 images, an image can't be read, sizes differ, or
            features are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if images.count < 2:
        raise ValueError(f"{images.name}: scores need at least 2 images, got {images.count}")
    gaussian, spatial = GaussianAccumulator(), GaussianAccumulator()
    features: list[Tensor] = []
    logits: list[Tensor] = []
    image_size = (0, 0)
    has_spatial = has_logits = True
    with tqdm(
        total=images.count, desc=images.name, unit="image", disable=None if progress else True, leave=False
    ) as bar:
        for batch in images.batches(batch_size):  # [B, C, H, W]
            image_size = (batch.shape[2], batch.shape[3])
            found = extractor(batch.to(extractor.device))
            try:
                gaussian.update(found.features)
                if found.spatial is not None:
                    spatial.update(found.spatial)
            except ValueError as error:
                raise ValueError(f"{images.name}, features of {extractor.name}: {error}") from None
            features.append(found.features.float().cpu())
            if found.logits is not None:
                logits.append(found.logits.float().cpu())
            has_spatial, has_logits = found.spatial is not None, found.logits is not None
            bar.update(len(batch))
    return ImageFeatures(
        name=images.name,
        gaussian=gaussian.result(),
        spatial=spatial.result() if has_spatial else None,
        features=torch.cat(features),
        logits=torch.cat(logits) if has_logits else None,
        image_size=image_size,
    )


def weights_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that change with any parameter or buffer of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
