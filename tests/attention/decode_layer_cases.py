"""Cases of the operator for one new token's attention layer, as arguments by name, and what defines its results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moh import MoHConfig
from moh.attention import moh_attention
from moh.routing import build_router

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CASES = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(B=3, bias=True, mask="bool"), id="batch-biases-bool-mask"),
    pytest.param(dict(B=2, mask="additive", own_angles=True), id="batch-additive-mask-own-angles"),
    pytest.param(dict(H=5, Hkv=1, D=6, C=17, length=1), id="odd-sizes"),
    pytest.param(dict(H=9, Hkv=3, D=64, C=576, length=530), id="as-large-as-SmolLM2"),
    pytest.param(dict(length=0), id="empty-cache"),
]


def inputs(
    B=1,
    H=4,
    Hkv=2,
    D=16,
    C=24,
    length=40,
    bias=False,
    mask=None,
    own_angles=False,
    shared=(1,),
    active=2,
    router=True,
    threshold=None,
):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(rows: int, columns: int) -> list[Tensor | None]:
        return [normal(rows, columns) / columns**0.5, normal(rows) if bias else None]

    active = H - len(shared) if active < 0 else active
    name = "linear" if threshold is None else "threshold"
    thresholds = None if threshold is None else [threshold] * (H - len(shared) + 1)
    config = MoHConfig(H, list(shared), active, name, thresholds=thresholds) if router else None
    gates = None if router else torch.rand(B, 1, H, generator=generator) * (normal(B, 1, H) > 0)
    contribution = [normal(H, C), normal(H)] if router else [None, None]
    angles = 6 * torch.rand(B if own_angles else 1, 1, D // 2, generator=generator).repeat(1, 1, 2)
    hidden = None
    if mask == "bool":
        hidden = torch.rand(B, 1, 1, length + 1, generator=generator) < 0.7
    if mask == "additive":
        hidden = normal(1, H, 1, length + 1)
    return dict(
        x=normal(B, 1, C),
        gates=gates,
        router=contribution,
        heads=[list(shared), active],
        projections=[*linear(H * D, C), *linear(Hkv * D, C), *linear(Hkv * D, C), *linear(C, H * D)],
        angles=[angles.cos(), angles.sin()],
        caches=[normal(B, Hkv, length + 7, D), normal(B, Hkv, length + 7, D)],
        length=length,
        mask=hidden,
        threshold=threshold,
    ), config


def to(value, dtype: torch.dtype):
    if isinstance(value, dict):
        return {name: to(item, dtype) for name, item in value.items()}
    if isinstance(value, list):
        return [to(item, dtype) for item in value]
    return value.to(dtype, copy=True) if isinstance(value, Tensor) and value.is_floating_point() else value


def call(case) -> Tensor:
    c = case
    return torch.ops.moh.cpu_decode_layer(
        c["x"],
        c["gates"],
        *c["router"],
        *c["heads"],
        *c["projections"],
        *c["angles"],
        *c["caches"],
        c["length"],
        c["mask"],
        0.3,
        *c.get("choice", (1, 1)),
        c["threshold"],
    )


def definition(case, config: MoHConfig | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and keys and values of all tokens."""
    x, n, projections = case["x"], case["length"], case["projections"]
    D = case["caches"][0].shape[-1]
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, D)).transpose(1, 2)
        for w, b in zip(projections[:6:2], projections[1:6:2], strict=True)
    )
    gates = case["gates"]
    if config is not None:
        router = build_router(config, x.shape[-1], dtype=x.dtype)
        router.load_state_dict({"contribution.weight": case["router"][0], "contribution.bias": case["router"][1]})
        gates = router(x).gates
    cos, sin = (angle[:, None] for angle in case["angles"])

    def rotated(t: Tensor) -> Tensor:
        return t * cos + torch.cat([-t[..., D // 2 :], t[..., : D // 2]], dim=-1) * sin

    keys, values = (
        torch.cat([cache[:, :, :n], new], dim=2) for cache, new in zip(case["caches"], (rotated(k), v), strict=True)
    )
    heads = moh_attention(rotated(q), keys, values, gates, attn_mask=case["mask"], scale=0.3, backend="reference")
    return F.linear(heads.flatten(2), *projections[6:]), keys, values


def assert_close(got: Tensor, expected: Tensor) -> None:
    allowed = TOLERANCE[got.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=allowed)
