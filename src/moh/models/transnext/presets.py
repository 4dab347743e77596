"""Named sizes of MoH-ViT, registered with timm: the published ones, their dense controls, and small ones to train on a CPU.

The number at the end is the share of active heads in per cent, over all layers, as the paper counts it.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from moh.models.transnext.model import MoHTransNeXt

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
MICRO_50: dict[str, Any] = dict(shared_heads=(1, 2, 4), active_heads=(1, 2, 4))
MICRO_75: dict[str, Any] = dict(shared_heads=(1, 2, 4), active_heads=(2, 4, 8))
MICRO_90: dict[str, Any] = dict(shared_heads=(4, 2, 4), active_heads=(0, 5, 10))


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


default_cfgs = generate_default_cfgs(
    {
        **{
            f"moh_transnext_{name}": _cfg(224, 7)
            for name in ("small_dense", "small_75", "small_80", "base_dense", "base_75", "base_50")
        },
        **{f"moh_transnext_micro32_{name}": _cfg(32, 4) for name in ("dense", "50", "75", "90")},
        **{f"moh_transnext_micro64_{name}": _cfg(64, 4) for name in ("dense", "50", "75", "90")},
    }
)


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> MoHTransNeXt:
    sizes = sizes | kwargs
    out_indices = tuple(range(len(sizes["embed_dims"])))
    return build_model_with_cfg(
        MoHTransNeXt, variant, pretrained, feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **sizes
    )


@register_model
def moh_transnext_small_dense(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """TransNeXt-S, every head of every token: the control."""
    return _create("moh_transnext_small_dense", pretrained, SMALL, kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-S-75."""
    sizes = SMALL | dict(shared_heads=(3, 6, 3, 4), active_heads=(0, 0, 6, 12))
    return _create("moh_transnext_small_75", pretrained, sizes, kwargs)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-S-80."""
    sizes = SMALL | dict(shared_heads=(3, 6, 3, 8), active_heads=(0, 0, 6, 12))
    return _create("moh_transnext_small_80", pretrained, sizes, kwargs)


@register_model
def moh_transnext_base_dense(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """TransNeXt-B, every head of every token: the control."""
    return _create("moh_transnext_base_dense", pretrained, BASE, kwargs)


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-B-75."""
    sizes = BASE | dict(shared_heads=(4, 8, 4, 5), active_heads=(0, 0, 8, 16))
    return _create("moh_transnext_base_75", pretrained, sizes, kwargs)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-B-50."""
    sizes = BASE | dict(shared_heads=(2, 2, 2, 4), active_heads=(2, 4, 6, 8))
    return _create("moh_transnext_base_50", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro32_dense(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 32 x 32, every head of every token: the control."""
    sizes = MICRO | dict(img_size=32, patch_size=2)
    return _create("moh_transnext_micro32_dense", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro32_50(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 32 x 32, 50 % of the heads."""
    sizes = MICRO | MICRO_50 | dict(img_size=32, patch_size=2)
    return _create("moh_transnext_micro32_50", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro32_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 32 x 32, 75 % of the heads."""
    sizes = MICRO | MICRO_75 | dict(img_size=32, patch_size=2)
    return _create("moh_transnext_micro32_75", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro32_90(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 32 x 32, 90 % of the heads."""
    sizes = MICRO | MICRO_90 | dict(img_size=32, patch_size=2)
    return _create("moh_transnext_micro32_90", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro64_dense(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 64 x 64, every head of every token: the control."""
    sizes = MICRO | dict(img_size=64, patch_size=4)
    return _create("moh_transnext_micro64_dense", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro64_50(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 64 x 64, 50 % of the heads."""
    sizes = MICRO | MICRO_50 | dict(img_size=64, patch_size=4)
    return _create("moh_transnext_micro64_50", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro64_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 64 x 64, 75 % of the heads."""
    sizes = MICRO | MICRO_75 | dict(img_size=64, patch_size=4)
    return _create("moh_transnext_micro64_75", pretrained, sizes, kwargs)


@register_model
def moh_transnext_micro64_90(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """For images of 64 x 64, 90 % of the heads."""
    sizes = MICRO | MICRO_90 | dict(img_size=64, patch_size=4)
    return _create("moh_transnext_micro64_90", pretrained, sizes, kwargs)
