"""Named vision transformers with MoH attention, registered with timm: sizes for 224 pixels, and small ones for a CPU.

The number at the end is the share of active heads in per cent, over all layers. `moh_vit` makes all others. With
`router_aux_loss_coef` above 0 the gradient of any training loop's loss has that of the balance loss too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from moh.models.heads import layer_configs
from moh.models.kinds import TIMM_SOURCES
from moh.models.timm.vit import dense_attentions, replace_attention
from moh.routing.attached import attach_to_layers

SHARES = (50, 75, 90)
"""Shares of active heads, in per cent."""

_SIZES: dict[str, dict[str, Any]] = {
    "moh_vit_tiny_patch16_224": dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "moh_vit_small_patch16_224": dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "moh_vit_base_patch16_224": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
}
# Ten narrow heads (8), so that 50, 75 and 90 % can be expressed; the mean over 49 or 64 tokens, no class token.
_MICRO = dict(patch_size=4, embed_dim=80, depth=6, num_heads=10, class_token=False, global_pool="avg", num_classes=10)
_MICRO_SIZES: dict[str, dict[str, Any]] = {
    f"moh_vit_micro_patch4_{side}": dict(img_size=side, **_MICRO) for side in (28, 32)
}

_NOT_OF_THE_MODEL = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "features_only",
                     "device", "dtype")  # fmt: skip


def preset_heads(percent: int, num_heads: int, depth: int) -> tuple[int, list[int]]:
    """Shared heads, and active routed heads of each layer, that use about `percent` % of all heads.

    A quarter of a layer's heads, rounded down, is shared, but no more than the smallest layer uses. The rest is spread
    over the layers as evenly as whole heads allow:

    | heads | 50 % | 75 % | 90 % |
    | --- | --- | --- | --- |
    | 3 | 1 or 2, none shared | 2 or 3 | 2 or 3 (32 of 36: 89 %) |
    | 6 | 3, of them 1 shared | 4 or 5 | 5 or 6 |
    | 10 | 5, of them 2 shared | 7 or 8 | 9 |
    | 12 | 6, of them 3 shared | 9 | 10 or 11 |
    """
    total = round(percent * num_heads * depth / 100)
    # differences of rounded running totals: they add up to `total` and differ by at most 1
    per_layer = [(i + 1) * total // depth - i * total // depth for i in range(depth)]
    shared = min(num_heads // 4, min(per_layer))
    return shared, [heads - shared for heads in per_layer]


def _with_heads(
    make: Callable[..., nn.Module],
    percent: int | None,
    *,
    shared_heads: int | list[int | list[int]] | None = None,
    active_heads: int | list[int] | None = None,
    router: str = "two_stage",
    thresholds: list[list[float] | None] | None = None,
    router_aux_loss_coef: float = 0.0,
    backend: str | None = None,
    **options: Any,
) -> nn.Module:
    """`make(**options)` with MoH attention; `percent` (a share, in per cent) sets the heads that are not given."""
    model = make(**options)
    attentions = dense_attentions(model)
    depth, num_heads = len(attentions), attentions[0].num_heads
    if percent is not None:
        default_shared, default_active = preset_heads(percent, num_heads, depth)
        shared_heads = default_shared if shared_heads is None else shared_heads
        if active_heads is None:
            if not isinstance(shared_heads, int):
                raise ValueError("active_heads must be given too where shared_heads is a list")
            active_heads = [default_shared + active - shared_heads for active in default_active]
    if shared_heads is None or active_heads is None:
        raise ValueError("shared_heads and active_heads must be given: numbers, or lists with one entry per layer")
    layers = layer_configs(
        depth, num_heads, shared_heads=shared_heads, active_heads=active_heads, router=router, thresholds=thresholds
    )
    attach_to_layers([a.router for a in replace_attention(model, layers, backend=backend)], router_aux_loss_coef)
    return model


def _create(
    make: Callable[..., nn.Module], variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]
) -> VisionTransformer:
    """The model of `sizes` and `kwargs`, which keeps the latter in `moh_arguments` (`moh.models.timm.saving`)."""
    out_indices = kwargs.pop("out_indices", 3)
    model: Any = build_model_with_cfg(
        make,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **(sizes | kwargs),
    )
    model.moh_arguments = {name: value for name, value in kwargs.items() if name not in _NOT_OF_THE_MODEL}
    return model  # type: ignore[no-any-return]


def _cfg(img_size: int, *, num_classes: int = 1000, crop_pct: float = 0.9) -> dict[str, Any]:
    return dict(
        url="",
        num_classes=num_classes,
        input_size=(3, img_size, img_size),
        pool_size=None,
        fixed_input_size=True,
        crop_pct=crop_pct,
        interpolation="bicubic",
        mean=IMAGENET_INCEPTION_MEAN,
        std=IMAGENET_INCEPTION_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
    )


_CFGS: dict[str, Any] = {
    **{f"{name}_{percent}": _cfg(224) for name in _SIZES for percent in SHARES},
    **{
        f"{name}_{kind}": _cfg(sizes["img_size"], num_classes=10, crop_pct=1.0)
        for name, sizes in _MICRO_SIZES.items()
        for kind in ("dense", *SHARES)
    },
    "moh_vit": _cfg(224),
}
default_cfgs = generate_default_cfgs(_CFGS)


def _register(variant: str, sizes: dict[str, Any], percent: int | None) -> None:
    make = VisionTransformer if percent is None else partial(_with_heads, VisionTransformer, percent)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _create(make, variant, pretrained, sizes, kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    heads = "every head of every token: the control" if percent is None else f"{percent} % of the heads"
    entrypoint.__doc__ = f"For images of {sizes['img_size']} x {sizes['img_size']}, {heads}."
    register_model(entrypoint)


for _name, _model_sizes in _SIZES.items():
    for _percent in SHARES:
        _register(f"{_name}_{_percent}", _model_sizes, _percent)
for _name, _model_sizes in _MICRO_SIZES.items():
    for _kind in (None, *SHARES):
        _register(f"{_name}_{_kind or 'dense'}", _model_sizes, _kind)


@register_model
def moh_vit(pretrained: bool = False, *, base: str, **kwargs: Any) -> VisionTransformer:
    """Any `VisionTransformer` of timm, by its name `base`, with MoH attention.

    Args:
        base: "vit_base_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", ...
        kwargs: `active_heads` (needed), `shared_heads`, `router`, `thresholds`, `router_aux_loss_coef`, `backend`, and what
            `base` itself takes.

    Raises:
        ValueError: the model is not a `VisionTransformer` that timm knows by name, an argument names other weights, or the
            heads don't add up.
    """
    if kwargs.get("pretrained_cfg") is None:
        found = get_pretrained_cfg(base)
        if found is not None:  # takes its image settings, not its weights, which have no routers
            kwargs["pretrained_cfg"] = described_as_moh(found.to_dict())  # type: ignore[no-untyped-call]
    return _create(partial(_with_heads, _dense, None), "moh_vit", pretrained, {}, {"base": base, **kwargs})


def _dense(*, base: str, **kwargs: Any) -> nn.Module:
    # Both may come from a config.json: a hub name or checkpoint_path would load somebody's weights, perhaps a pickle.
    if not timm.is_model(base.partition(".")[0]):
        raise ValueError(f"base must be the name of a model of timm, got {base!r}")
    if sources := sorted(kwargs.keys() & set(TIMM_SOURCES)):
        raise ValueError(f"the arguments of a model must not set {', '.join(sources)}: weights are loaded afterwards")
    return timm.create_model(base, **kwargs)


def described_as_moh(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """A dense model's `pretrained_cfg` for the MoH model made of it: without its name and the place of its weights."""
    sources = ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load", "tag")
    kept = {name: value for name, value in pretrained_cfg.items() if name not in sources}
    return kept | {"architecture": "moh_vit", "url": ""}
