"""Tiny labelled images in each form that a recipe can name, and a complete recipe of a tiny ViT as options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moh.data.images.sources import TensorImages

sys.path.insert(0, str(Path(__file__).parent))

from image_cases import CLASSES, pictures, write_folders, write_idx


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A directory with train/ (12 images of each of three classes) and val/ (4 of each)."""
    write_folders(tmp_path / "data" / "train", 12)
    write_folders(tmp_path / "data" / "val", 4, seed=50)
    return tmp_path / "data"


@pytest.fixture
def tensors() -> TensorImages:
    labels = torch.arange(24) % 3
    return TensorImages(pictures(labels), labels, CLASSES, mean=(0.5,), std=(0.25,))


@pytest.fixture
def options(idx_folder: Path, tmp_path: Path) -> list[str]:
    """Command-line overrides that make a complete recipe: a tiny ViT on tiny Fashion-MNIST, six steps."""
    return [
        "--task=image_classification",
        "--model.name=vit_tiny_patch16_224",
        "--model.kwargs={'img_size': 8, 'patch_size': 4, 'in_chans': 1, 'embed_dim': 16, 'depth': 2, 'num_heads': 4}",
        f"--data.dataset={idx_folder}",
        f"--training.output_dir={tmp_path / 'out'}",
        "--training.max_steps=6",
        "--training.per_device_train_batch_size=8",
        "--training.logging_steps=1",
        "--training.save_steps=100",
        "--training.precision=fp32",
        "--training.extra={'disable_tqdm': true}",
    ]
