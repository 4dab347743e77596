"""Tiny labelled images on disk, a tiny VAE, and a complete recipe of a tiny diffusion model as options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from diffusers import AutoencoderKL
from PIL import Image

HEADS = "'num_attention_heads': 4, 'attention_head_dim': 8, 'hidden_size': 32, 'num_layers': 2, 'patch_size': 2"


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with 12 and 2 pictures per class, 8 x 8: bright left halves ("cat") or upper halves ("dog")."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 80, (8, 8, 3), generator=generator, dtype=torch.uint8)
                (pixels[:, :4] if name == "cat" else pixels[:4]).add_(160)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def vae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that halves height and width."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def options(image_dir: Path, tmp_path: Path) -> list[str]:
    """Command-line overrides that make a complete recipe: a MoH run of six steps on pixels in `tmp_path / "out"`."""
    return [
        "--task=diffusion",
        "--model.preset=moh_dit_micro_4_75",
        f"--model.overrides={{{HEADS}, 'shared_heads': 1, 'active_heads': 2}}",
        f"--data.dataset={image_dir}",
        "--data.image_size=8",
        f"--training.output_dir={tmp_path / 'out'}",
        "--training.max_steps=6",
        "--training.learning_rate=0.003",
        "--training.per_device_train_batch_size=4",
        "--training.logging_steps=1",
        "--training.save_steps=6",
        "--training.precision=fp32",
        "--training.ema_warmup=true",
        "--training.extra={'disable_tqdm': true}",
    ]
