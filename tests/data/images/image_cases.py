"""Tiny labelled images, as tensors and as files in each form that a recipe can name."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from moh.data.images.sources import TensorImages

SIDE = 8
CLASSES = ("cat", "dog", "eel")


def pictures(labels: torch.Tensor, *, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """`[n, C, 8, 8]` uint8 noise with a bright bar at a place given by the label `[n]`: easy to classify."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 100, (len(labels), channels, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for picture, label in zip(pixels, labels.tolist(), strict=True):
        picture[:, label % 5, 4 * (label // 5) : 4 * (label // 5) + 4] = 250
    return pixels


def write_idx(folder: Path, *, train: int = 60, test: int = 21, compressed: bool = False) -> Path:
    """Fashion-MNIST's four files, with smaller and fewer images."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate({"train": train, "t10k": test}.items()):
        labels = torch.arange(count) % 10
        pixels = pictures(labels, seed=seed)[:, 0]
        for kind, tensor in {"images-idx3": pixels, "labels-idx1": labels.to(torch.uint8)}.items():
            data = struct.pack(f">{1 + tensor.ndim}I", 0x800 + tensor.ndim, *tensor.shape) + tensor.numpy().tobytes()
            path = folder / f"{part}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(data) if compressed else data)
    return folder


def write_folders(root: Path, count: int, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """`root/CLASS/NUMBER.png`, colour images of 8x8 pixels, `count` per class."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number, image in enumerate(pictures(torch.full((count,), label), channels=3, seed=seed + label)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A directory with train/ (12 images per class, three classes) and val/ (4 per class)."""
    write_folders(tmp_path / "data" / "train", 12)
    write_folders(tmp_path / "data" / "val", 4, seed=50)
    return tmp_path / "data"


@pytest.fixture
def tensors() -> TensorImages:
    labels = torch.arange(24) % 3
    return TensorImages(pictures(labels), labels, CLASSES, mean=(0.5,), std=(0.25,))
