"""Random images and tiny models for the tests of `moh.evaluation.generation`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from moh.evaluation.generation import Extracted


def random_images(
    n: int, *, seed: int, channels: int = 3, height: int = 8, width: int = 8, bright: int = 256
) -> Tensor:
    """`[n, channels, height, width]` uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, bright, (n, channels, height, width), generator=generator, dtype=torch.uint8)


def write_pngs(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array if array.shape[2] == 3 else array[..., 0]).save(folder / f"{i:05d}.png")
    return folder


def write_npz(path: Path, images: Tensor, **arrays: np.ndarray) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path


class TinyExtractor:
    """Six features, a spatial map of twelve numbers and five logits: linear maps of 8 x 8 pixels, through a ReLU."""

    name, fingerprint, is_fid, channels = "tiny", "0123456789abcdef", False, 3
    device = torch.device("cpu")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.weights = [torch.randn(192, size, generator=generator) / 192**0.5 for size in (6, 12, 5)]
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Extracted:
        self.batches.append(len(images))
        x = images.float().flatten(1) / 64
        features, spatial, logits = (x @ weight for weight in self.weights)
        return Extracted(features.relu(), spatial, logits)


def tiny_classifier(*, channels: int = 3, classes: int = 5, kind: str = "test_resnet") -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(
        kind, num_classes=classes, in_chans=channels, 
        pretrained_cfg_overlay={"input_size": (channels, 32, 32), "mean": (0.4,) * channels, "std": (0.2,) * channels},
        **({"img_size": 32} if "vit" in kind else {}),
    )  # fmt: skip
    return model.eval()


def save_tiny_classifier(folder: Path, *, channels: int = 3) -> Path:
    """A classifier on disk, as timm saves it."""
    folder.mkdir(parents=True)
    config = {"input_size": [channels, 32, 32], "mean": [0.5] * channels, "std": [0.5] * channels}
    config |= {"interpolation": "bilinear"}
    model = tiny_classifier(channels=channels)
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 5, "num_features": 64, "pretrained_cfg": config})
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
