"""Tiny diffusion models with weights that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from diffusers import AutoencoderKL

from moh.models.diffusers import MoHDiTTransformer2DModel
from moh.sampling import ImageModel, diffusion_scheduler

SIZES: dict[str, Any] = dict(
    num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_classes=5, in_channels=1,
    shared_heads=1, active_heads=2,
)  # fmt: skip


@pytest.fixture
def tiny() -> Callable[..., ImageModel]:
    """`tiny(in_channels=3, vae=..., class_names=...)`: a model that draws 8 x 8 pixels, or latents with a VAE."""

    def make(*, vae: AutoencoderKL | None = None, class_names: tuple[str, ...] = (), **sizes: Any) -> ImageModel:
        torch.manual_seed(0)
        model = MoHDiTTransformer2DModel(**SIZES | sizes).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.5 if "router" in name else 0.1)
        return ImageModel(model, diffusion_scheduler(clip=vae is None), vae, class_names)

    return make


@pytest.fixture
def vae() -> AutoencoderKL:
    """Images of 16 x 16 to latents of 8 x 8."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
