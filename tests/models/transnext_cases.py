"""A tiny TransNeXt with weights that matter, and the golden models, for the tests of the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"

TINY: dict[str, Any] = dict(
    img_size=32,
    patch_size=2,
    embed_dims=(8, 16, 32),
    num_heads=(2, 4, 4),
    depths=(1, 1, 1),
    mlp_ratios=(2, 2, 2),
    sr_ratios=(4, 2, 1),
    num_classes=5,
)
ROUTED: dict[str, Any] = dict(shared_heads=(2, 1, 1), active_heads=(0, 1, 2))


def stir(model: nn.Module) -> nn.Module:
    """Makes weights large enough for attention and routing to matter; initial ones nearly average the values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "temperature" not in name:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
    return model


def tiny_model(*, dense: bool = False, **options: Any) -> nn.Module:
    from moh.models.timm.transnext import MoHTransNeXt

    torch.manual_seed(0)
    return stir(MoHTransNeXt(**TINY | ({} if dense else ROUTED) | options)).eval()


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


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
