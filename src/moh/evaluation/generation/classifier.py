"""Features of a classifier that the user names, where FID's Inception network can't be had or does not fit the images.

A Frechet distance on them is not comparable with FID, nor with one on another classifier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from moh.evaluation.generation.features import Extracted, weights_fingerprint
from moh.models.image_loading import ImageInput, image_input, load_image_classifier

_SPATIAL_CHANNELS = 7
"""As many channels of the feature map as sFID takes of Inception's."""


class ClassifierFeatures:
    """Features of an image classifier with timm's interface.

    features: what goes into the last layer. spatial: the first 7 channels of the last feature map (or of the tokens).
    logits: its output, None for a model without classes. Images are resized, whole, to the size of the model's input, and
    normalised as the model wants it.

    Args:
        model: any timm model, or one with `forward_features`, `forward_head(x, pre_logits)`; set to evaluation mode.
        name: what every output calls it.
        wanted: size, mean, std and interpolation of the model's input; None asks the model.
        device: where the model goes and computes.

    Raises:
        ValueError: the model has no such interface, neither 1 nor 3 input channels, or a mean or std of other length.
    """

    is_fid = False

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        wanted: ImageInput | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not (callable(getattr(model, "forward_features", None)) and callable(getattr(model, "forward_head", None))):
            raise ValueError(
                f"the classifier must have timm's forward_features and forward_head, {type(model).__name__} has not"
            )
        wanted = image_input(model) if wanted is None else wanted
        channels, height, width = wanted.size
        if channels not in (1, 3):
            raise ValueError(f"the classifier must take images of 1 or 3 channels, {name} takes {channels}")
        if len(wanted.mean) != channels or len(wanted.std) != channels:
            raise ValueError(f"mean and std must have {channels} numbers each, got {wanted.mean} and {wanted.std}")
        self.name = name
        self.channels: int = channels
        self.device = device or torch.device("cpu")
        self._model: Any = model.eval().to(self.device)
        self._size = [height, width]
        bilinear = wanted.interpolation == "bilinear"
        self._interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
        self._mean = torch.tensor(wanted.mean, device=self.device).view(-1, 1, 1)  # [C, 1, 1]
        self._std = torch.tensor(wanted.std, device=self.device).view(-1, 1, 1)
        self.fingerprint = weights_fingerprint(model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        """Features of uint8 images `[B, channels, H, W]`: `[B, d]`, `[B, s]`, `[B, classes]`."""
        x = images.float() / 255
        if list(x.shape[2:]) != self._size:
            x = resize(x, self._size, interpolation=self._interpolation, antialias=True).clamp(0, 1)
        maps = self._model.forward_features((x - self._mean) / self._std)
        features = self._model.forward_head(maps, pre_logits=True).flatten(1)
        logits = self._model.forward_head(maps) if getattr(self._model, "num_classes", 1) > 0 else None
        return Extracted(features, self._spatial(maps), logits)

    def _spatial(self, maps: Tensor) -> Tensor | None:
        if maps.ndim == 4 and getattr(self._model, "output_fmt", "NCHW") == "NCHW":
            return maps[:, :_SPATIAL_CHANNELS].flatten(1)  # [B, 7 * H * W]
        if maps.ndim in (3, 4):
            return maps[..., :_SPATIAL_CHANNELS].flatten(1)  # [B, tokens, C] or [B, H, W, C]
        return None


def load_classifier(path_or_name: str | Path, *, device: torch.device | None = None) -> ClassifierFeatures:
    """The classifier that `--features` names, with its trained weights.

    Args:
        path_or_name: as `load_image_classifier` takes it: a directory as we and timm save classifiers, or a name of timm's.
        device: where the model goes and computes.

    Raises:
        ValueError: there is no such model, or it can't be read or downloaded.
    """
    return ClassifierFeatures(load_image_classifier(path_or_name), name=str(path_or_name), device=device)
