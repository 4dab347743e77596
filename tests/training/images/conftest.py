"""Tiny labelled images in each form that a recipe can name, and a complete recipe of a tiny ViT as options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "images"))

from image_cases import folders, idx_folder, tensors  # noqa: F401 (fixtures)


@pytest.fixture
def options(idx_folder: Path, tmp_path: Path) -> list[str]:  # noqa: F811
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
