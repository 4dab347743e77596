"""Named sizes of MoH-ViT, registered with timm: the published ones, their dense controls, and small ones to train on a CPU.

The number at the end is the share of active heads in per cent, over all layers, as the paper counts it. With
`pretrained=True` the published ones (tag `moh_in1k`) get the weights that the paper's authors have on the hub.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from moh.models.timm.transnext.model import MoHTransNeXt
from moh.models.timm.transnext.published import own_names

SMALL: dict[str, Any] = dict(
    embed_dims=(72, 144, 288, 576),
    num_heads=(3, 6, 12, 24),
    depths=(5, 5, 22, 5),
    mlp_ratios=(8, 8, 4, 4),
    sr_ratios=(8, 4, 2, 1),
)
BASE: dict[str, Any] = dict(
    embed_dims=(96, 192, 384, 768),
    num_heads=(4, 8, 16, 32),
    depths=(5, 5, 23, 5),
    mlp_ratios=(8, 8, 4, 4),
    sr_ratios=(8, 4, 2, 1),
)
# Three stages of 16 x 16, 8 x 8 and 4 x 4 tokens: a fourth would have 2 x 2. Heads are narrow (8), so that there are
# enough of them to choose from; pooled keys are 4 x 4 everywhere.
MICRO: dict[str, Any] = dict(
    embed_dims=(32, 64, 128),
    num_heads=(4, 8, 16),
    depths=(1, 2, 2),
    mlp_ratios=(2, 2, 2),
    sr_ratios=(4, 2, 1),
)
_MICRO_HEADS: dict[str, dict[str, Any]] = {
    "dense": {},
    "50": dict(shared_heads=(1, 2, 4), active_heads=(1, 2, 4)),
    "75": dict(shared_heads=(1, 2, 4), active_heads=(2, 4, 8)),
    "90": dict(shared_heads=(4, 2, 4), active_heads=(0, 5, 10)),
}
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "small_dense": ("TransNeXt-S, every head of every token: the control.", SMALL),
    "small_75": ("MoH-ViT-S-75.", SMALL | dict(shared_heads=(3, 6, 3, 4), active_heads=(0, 0, 6, 12))),
    "small_80": ("MoH-ViT-S-80.", SMALL | dict(shared_heads=(3, 6, 3, 8), active_heads=(0, 0, 6, 12))),
    "base_dense": ("TransNeXt-B, every head of every token: the control.", BASE),
    "base_75": ("MoH-ViT-B-75.", BASE | dict(shared_heads=(4, 8, 4, 5), active_heads=(0, 0, 8, 16))),
    "base_50": ("MoH-ViT-B-50.", BASE | dict(shared_heads=(2, 2, 2, 4), active_heads=(2, 4, 6, 8))),
} | {
    f"micro{side}_{share}": (
        f"For images of {side} x {side}, "
        + ("every head of every token: the control." if share == "dense" else f"{share} % of the heads."),
        MICRO | heads | dict(img_size=side, patch_size=side // 16),
    )
    for side in (32, 64)
    for share, heads in _MICRO_HEADS.items()
}
"""name after "moh_transnext_" -> (what it is, its architecture)."""

PUBLISHED = {
    "small_75": "Chat-UniVi/MoH-ViT-S-75",
    "small_80": "Chat-UniVi/MoH-ViT-S-80",
    "base_75": "Chat-UniVi/MoH-ViT-B-75",
    "base_50": "Chat-UniVi/MoH-ViT-B-50",
}
"""Those whose weights, trained on ImageNet-1k, are published -> where on the hub."""


def architecture(name: str) -> dict[str, Any]:
    """The arguments of `MoHTransNeXt` of a registered model."""
    return dict(_PRESETS[name.removeprefix("moh_transnext_")][1])


def _cfg(img_size: int, pool_size: int) -> dict[str, Any]:
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, img_size, img_size),
        pool_size=(pool_size, pool_size),
        fixed_input_size=False,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stages.0.patch_embed.proj",
        classifier="head",
        license="apache-2.0",
    )


def _published(name: str) -> dict[str, Any]:
    return dict(hf_hub_id=PUBLISHED[name], hf_hub_filename=f"moh_transnext_{name}.pth", origin_url=_ORIGIN)


_ORIGIN = "https://github.com/SkyworkAI/MoH"

default_cfgs = generate_default_cfgs(
    {
        f"moh_transnext_{name}" + (".moh_in1k" if name in PUBLISHED else ""): _cfg(
            sizes.get("img_size", 224), 4 if name.startswith("micro") else 7
        )
        | (_published(name) if name in PUBLISHED else {})
        for name, (_, sizes) in _PRESETS.items()
    }
)


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> MoHTransNeXt:
    sizes = sizes | kwargs
    out_indices = tuple(range(len(sizes["embed_dims"])))
    with torch.serialization.safe_globals([argparse.Namespace]):  # the published files keep their training's arguments
        return build_model_with_cfg(
            MoHTransNeXt,
            variant,
            pretrained,
            pretrained_filter_fn=own_names,
            feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
            **sizes,
        )


def _register(variant: str, description: str, sizes: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
        return _create(variant, pretrained, sizes, kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = description
    register_model(entrypoint)


for _name, (_description, _sizes) in _PRESETS.items():
    _register(f"moh_transnext_{_name}", _description, _sizes)
