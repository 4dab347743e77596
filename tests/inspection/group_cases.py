"""Tiny models of the three kinds, whose layers route differently, their inputs, and made-up head use."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from moh import MoHConfig
from moh.data.images.recipe import ImageInput
from moh.data.images.sources import TensorImages
from moh.inspection import HeadUse, InputSample, LayerHeads

CLASSES = ("ant", "bee", "cow")
SEEN = ImageInput((1, 8, 8), (0.5,), (0.25,))
TINY: dict[str, Any] = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=4)


def classifier() -> nn.Module:
    heads = dict(shared_heads=1, active_heads=[1, 2])
    return _stirred(timm.create_model("moh_vit", base="vit_tiny_patch16_224", num_classes=3, **heads, **TINY), 0.3)


def dense_classifier() -> nn.Module:
    return _stirred(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY), 0.3)


def images(labels: list[int]) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.tensor(labels), CLASSES)


def normalised(source: TensorImages) -> Tensor:
    return (source.pixels.float() / 255 - 0.5) / 0.25


def diffusion_model(*, dense: bool = False) -> Any:
    from moh.models.diffusers import MoHDiTTransformer2DModel
    from moh.sampling import ImageModel, diffusion_scheduler

    heads = {} if dense else dict(shared_heads=[4, 1], active_heads=[0, 2])
    sizes = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_classes=3, in_channels=1)
    model = _stirred(MoHDiTTransformer2DModel(**sizes, **heads), 0.1)
    return ImageModel(model.eval(), diffusion_scheduler(clip=True), None, CLASSES)


def made_up(inputs: dict[str, list[list[float]]], *, tokens: int = 100, shared: int = 1, active: int = 1) -> HeadUse:
    """Head use of one layer, from the loads of its routed heads for each input of each group."""
    rows = torch.tensor([row for group in inputs.values() for row in group])
    groups = torch.tensor([place for place, group in enumerate(inputs.values()) for _ in group])
    loads = torch.cat([torch.ones(len(rows), shared), rows], dim=1)  # [m, H]
    means = torch.stack([loads[groups == place].double().mean(0) for place in range(len(inputs))])
    layer = LayerHeads("attention", loads.shape[1], MoHConfig(loads.shape[1], shared, active))
    sizes = torch.tensor([len(group) for group in inputs.values()])
    sample = InputSample(groups, [loads * tokens], torch.full((len(rows), 1), float(tokens)))
    return HeadUse(
        tuple(inputs), [layer], [means], [means], [means], (sizes * float(tokens))[:, None].double(), sizes, sample
    )


def random_use(groups: int, layers: list[MoHConfig | None], heads: int = 4) -> HeadUse:
    """Random loads, for pictures; None is a dense layer of `heads` heads."""
    generator = torch.Generator().manual_seed(0)
    described = [LayerHeads(f"layers.{i}", c.num_heads if c else heads, c) for i, c in enumerate(layers)]
    load = [torch.rand(groups, layer.num_heads, generator=generator, dtype=torch.float64) for layer in described]
    active = [torch.cat([row, row]).float() * 10 for row in load]
    sample = InputSample(torch.arange(groups).repeat(2), active, torch.full((2 * groups, len(layers)), 10.0))
    return HeadUse(
        tuple(f"group {number}" for number in range(groups)),
        described,
        load,
        load,
        load,
        torch.full((groups, len(layers)), 20.0, dtype=torch.float64),
        torch.full((groups,), 2),
        sample,
    )


def _stirred(model: nn.Module, std: float) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if "router" in name else std)
    return model
