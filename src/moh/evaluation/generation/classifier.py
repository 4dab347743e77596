"""Features for scoring images: the Inception network's, or those of a given classifier."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from moh.data.images.recipe import ImageInput
from moh.evaluation.generation.features import Extracted, weights_fingerprint
from moh.models.classifiers import load_classifier as load_any_classifier
from moh.models.timm.loading import image_input

_SPATIAL_CHANNELS = 7
"""sFID uses the first 7 channels of a 17 x 17 map: 2,023 numbers, about as many as the 2,048 of FID."""


class InceptionFeatures:
    """FID's network: 2,048 pooled features, 2,023 spatial ones (`mixed_6/conv`, as in the ADM suite), logits without bias.

    Images of any size are resized to 299 x 299 as in TensorFlow 1.

    Args:
        weights: file of the weights; None looks in `torch.hub`'s folder, and downloads them if they are missing.
        device: where it computes.

    Attributes:
        is_fid: whether the weights are those behind published FID values, by the file's SHA-256.

    Raises:
        FileNotFoundError: the weights are not in the file or folder, and could not be downloaded.
        ValueError: the file does not hold the network's weights.
    """

    channels = 3

    def __init__(self, weights: str | Path | None = None, *, device: torch.device | None = None) -> None:
        path = _find_weights() if weights is None else Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file with Inception weights at {path}")
        self.is_fid = _sha256(path).startswith(_hash_prefix())
        self.name = "Inception-v3" if self.is_fid else f"Inception-v3 with the weights of {path.name}"
        self.device = device or torch.device("cpu")
        self._model = _load(path).to(self.device)
        self.fingerprint = weights_fingerprint(self._model)
        # TensorFlow's mixed_6/conv: the 1x1 branch, after its ReLU
        self._model.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)
        self._map: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        """Features of uint8 images `[B, 3, H, W]`: `[B, 2048]`, `[B, 2023]`, `[B, 1008]`, float32."""
        features, logits = self._model(images)
        assert self._map is not None
        channels_last = self._map[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # [B, 17, 17, 7], TensorFlow's order
        self._map = None
        return Extracted(features, channels_last.flatten(1), logits)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._map = output  # [B, 192, 17, 17]


def _find_weights() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(URL_INCEPTION_V3).path).name
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=_hash_prefix())
    except (OSError, RuntimeError) as error:  # RuntimeError: the download has the wrong hash
        raise FileNotFoundError(
            f"the Inception weights that FID needs are not at {path}, and downloading them from {URL_INCEPTION_V3} failed "
            f"({error}); put the file there, give one with --inception (weights=...), or give a classifier with "
            "--features, whose Frechet distance is not FID"
        ) from None
    return path


def _load(path: Path) -> nn.Module:
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the library's own loading would run code in the file
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} does not hold the weights of torch-fidelity's Inception network: {reason}") from None
    assert isinstance(model, nn.Module)
    return model


def _hash_prefix() -> str:
    """The file's name ends with the beginning of its SHA-256."""
    return Path(urlparse(URL_INCEPTION_V3).path).stem.rpartition("-")[2]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ClassifierFeatures:
    """Features of an image classifier with timm's interface.

    features: the last layer's input. spatial: the first 7 channels of the last feature map (or of the tokens).
    logits: the output, None for a model without classes. Whole images are resized to the model's input size and
    normalised for the model.

    Args:
        model: any timm model, or one with `forward_features`, `forward_head(x, pre_logits)`; set to evaluation mode.
        name: its name in every output.
        wanted: size, mean, std and interpolation of the model's input; None takes them from the model.
        device: moves the model there and computes there.

    Raises:
        ValueError: the model lacks this interface, does not take 1 or 3 channels, or the length of mean or std is not
            their number.
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
                f"the classifier must have timm's forward_features and forward_head, {type(model).__name__} does not"
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


def load_classifier(
    path_or_name: str | Path, *, device: torch.device | None = None, revision: str | None = None
) -> ClassifierFeatures:
    """The classifier for `--features`, with its trained weights.

    Args:
        path_or_name: a directory of a classifier saved by us or timm, one of timm's names, or "OWNER/NAME" on the hub.
        device: moves the model there and computes there.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: there is no such model, it can't be read or downloaded, or it is not timm's.
    """
    model = load_any_classifier(path_or_name, revision=revision)
    return ClassifierFeatures(model, name=str(path_or_name), device=device)
