"""Named sizes of diffusion transformers: the published MoH-DiT, their dense controls, and small ones for small images.

The number at the end is the share of active heads in per cent, over all layers; the one before it is the patch size.
"""

from __future__ import annotations

from typing import Any

from moh.models.diffusers.dit import MoHDiTTransformer2DModel

_THIRDS_XL = (9, 10, 9)
_THIRDS_L = (8, 8, 8)


def _stages(counts: tuple[int, ...], values: tuple[int, ...]) -> list[int]:
    """One value per layer, from one per stage."""
    return [value for count, value in zip(counts, values, strict=True) for _ in range(count)]


def _sizes(layers: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
    return dict(num_layers=layers, hidden_size=width, num_attention_heads=heads, attention_head_dim=head_dim)


def _routed(shared: list[int], active: list[int]) -> dict[str, Any]:
    return dict(shared_heads=shared, active_heads=active)


_DENSE: dict[str, dict[str, Any]] = {
    "xl_2": _sizes(28, 1152, 16, 72) | dict(patch_size=2),
    "l_2": _sizes(24, 1024, 16, 64) | dict(patch_size=2),
    "b_2": _sizes(12, 768, 12, 64) | dict(patch_size=2),
    "s_2": _sizes(12, 384, 6, 64) | dict(patch_size=2),
    # Pixels of small images: heads are narrow (16), so that there are enough of them to choose from.
    **{
        f"micro_{patch}": _sizes(6, 128, 8, 16) | dict(patch_size=patch, in_channels=3, sample_size=32, num_classes=10)
        for patch in (2, 4)
    },
}
_MICRO_ROUTING = {
    "90": _routed([4, 4, 4, 4, 4, 8], [3, 3, 3, 3, 3, 0]),
    "75": _routed([4, 4, 4, 4, 4, 8], [1, 1, 2, 2, 2, 0]),
}
_HEADS_XL = dict(num_attention_heads=_stages(_THIRDS_XL, (8, 16, 24)))
_HEADS_L = dict(num_attention_heads=_stages(_THIRDS_L, (8, 16, 24)))
_ROUTING: dict[str, dict[str, dict[str, Any]]] = {
    "xl_2": {
        "90": _HEADS_XL | _routed(_stages(_THIRDS_XL, (8, 16, 16)), _stages(_THIRDS_XL, (0, 0, 3))),
        "75": _HEADS_XL | _routed(_stages(_THIRDS_XL, (8, 10, 14)), _stages(_THIRDS_XL, (0, 2, 2))),
    },
    "l_2": {
        "90": _HEADS_L | _routed(_stages(_THIRDS_L, (8, 16, 16)), _stages(_THIRDS_L, (0, 0, 3))),
        "75": _HEADS_L | _routed(_stages(_THIRDS_L, (8, 8, 12)), _stages(_THIRDS_L, (0, 4, 4))),
    },
    "b_2": {
        "90": _routed([6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2),
        "75": _routed([4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2),
    },
    "s_2": {
        "90": _routed([3] * 8 + [6] * 4, [2] * 8 + [0] * 4),
        "75": _routed([2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2),
    },
    "micro_2": _MICRO_ROUTING,
    "micro_4": _MICRO_ROUTING,
}
_PRESETS = {f"dit_{size}": sizes for size, sizes in _DENSE.items()} | {
    f"moh_dit_{size}_{share}": _DENSE[size] | routing
    for size, shares in _ROUTING.items()
    for share, routing in shares.items()
}

DIT_NAMES = tuple(sorted(_PRESETS))
"""Names that `create_dit` knows."""


def architecture(name: str) -> dict[str, Any]:
    """The arguments of `MoHDiTTransformer2DModel` of a named size."""
    return dict(_PRESETS[name])


def create_dit(name: str, **overrides: Any) -> MoHDiTTransformer2DModel:
    """A diffusion transformer of a named size with random weights.

    Args:
        name: one of `DIT_NAMES`: `moh_dit_{s,b,l,xl}_2_{90,75}` for latents of 32 x 32 x 4 and 1,000 classes, as published;
            `moh_dit_micro_{2,4}_{90,75}` for pixels, 32 x 32 x 3 and 10 classes unless overridden;
            `dit_{s,b,l,xl,micro}_...` without a share are the dense controls.
        overrides: arguments of `MoHDiTTransformer2DModel`, such as `sample_size`, `in_channels` and `num_classes`.

    Raises:
        ValueError: the name is unknown, or sizes don't match.

    Examples:
        >>> model = create_dit("moh_dit_micro_4_75", sample_size=28, in_channels=1)
        >>> model.share
        0.75
    """
    if name not in _PRESETS:
        raise ValueError(f"name must be one of {', '.join(DIT_NAMES)}, got {name!r}")
    model: MoHDiTTransformer2DModel = MoHDiTTransformer2DModel(**_PRESETS[name] | overrides)
    return model
