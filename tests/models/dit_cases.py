"""A tiny diffusion transformer with weights that matter, and the golden models, for the tests of the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"
TINY: dict[str, Any] = dict(
    num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, num_classes=5, in_channels=3
)
ROUTED: dict[str, Any] = dict(shared_heads=[4, 1, 2], active_heads=[0, 2, 1])


def stir(model: nn.Module) -> nn.Module:
    """Makes weights large enough for every part to matter; initially blocks are the identity and the output is 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if "router" in name else 0.1)
    return model


def tiny_model(*, dense: bool = False, **options: Any) -> nn.Module:
    from moh.models.diffusers import MoHDiTTransformer2DModel

    torch.manual_seed(0)
    return stir(MoHDiTTransformer2DModel(**TINY | ({} if dense else ROUTED) | options)).eval()


def tiny_inputs(*, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, time steps and class ids, including "no class"."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)
    return x, torch.randint(1000, (batch,), generator=generator), torch.arange(batch) * 5 // max(batch - 1, 1)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The published configuration and all tensors of `tests/golden/NAME.safetensors`."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = GOLDEN / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    return config, load_file(file)


def published_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
