"""Promises of timm's attention with routed heads: the definition's values, timm's names, all of timm's options."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="the vision extra is not installed")

from timm.layers.attention import Attention

import moh
from moh.models.timm import MoHViTAttention

H, D = 4, 8
TAKES = inspect.signature(Attention.__init__).parameters
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(qkv_bias=True), id="bias"),
    pytest.param(dict(qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm), id="normalised-queries"),
    pytest.param(dict(scale_norm=True, norm_layer=nn.LayerNorm), id="normalised-heads"),
    pytest.param(dict(gated=True), id="gated"),
    pytest.param(dict(attn_head_dim=5, dim_out=12), id="own-widths"),
    pytest.param(dict(proj_bias=False), id="no-output-bias"),
]


def make(router: str = "two_stage", **options: Any) -> MoHViTAttention:
    missing = set(options) - set(TAKES)
    if missing:
        pytest.skip(f"this timm has no {', '.join(missing)}")
    torch.manual_seed(0)
    layer = MoHViTAttention(H * D, H, shared_heads=1, active_heads=2, router=router, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer.eval()


def by_definition(layer: MoHViTAttention, x: Tensor, **masks: Any) -> Tensor:
    """timm's own attention with the same parameters; each head is multiplied by its gate before the next module."""
    dense = Attention.__new__(Attention)
    dense.__dict__.update(layer.__dict__)
    dense.fused_attn = True
    q = layer.qkv(x).view(*x.shape[:2], 3, H, -1)[:, :, 0]
    gates = layer.router(x, q).gates

    def weigh(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return ((args[0].unflatten(-1, (H, -1)) * gates[..., None]).flatten(2),)

    first = next(m for m in (layer.norm, layer.proj) if not isinstance(m, nn.Identity))
    if getattr(layer, "gate", None) is not None:  # routing gates commute with timm's elementwise gate
        first = layer.proj
    handle = first.register_forward_pre_hook(weigh)
    try:
        return Attention.forward(dense, x, **masks)
    finally:
        handle.remove()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("router", ["two_stage", "linear", "query_norm"])
def test_values_and_gradients_are_those_of_timms_attention_with_gated_heads(router, options) -> None:
    if router == "query_norm" and options.get("qk_norm"):
        pytest.skip("refused, see below")
    layer, x = make(router, **options), torch.randn(2, 40, H * D, requires_grad=True)
    got, expected = layer(x), by_definition(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if router != "two_stage":
        return  # hard gates: the gradient of an inactive head is defined as 0, unlike in the definition above
    weight = torch.randn_like(expected)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(0.1)


MASKS = {
    "bool": torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.7,
    "added": torch.randn(20, 20, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_a_mask_is_read_as_timm_reads_it(kind) -> None:
    layer, x = make(qkv_bias=True), torch.randn(2, 20, H * D)
    mask = MASKS[kind] | torch.eye(20, dtype=torch.bool) if kind == "bool" else MASKS[kind]
    torch.testing.assert_close(layer(x, attn_mask=mask), by_definition(layer, x, attn_mask=mask), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_causal_attention_sees_no_later_token() -> None:
    layer, x = make(), torch.randn(1, 20, H * D)
    changed = x.clone()
    changed[:, 12:] += 1
    assert torch.equal(layer(x, is_causal=True)[:, :12], layer(changed, is_causal=True)[:, :12])
    assert not torch.allclose(layer(x)[:, :12], layer(changed)[:, :12])


def test_parameters_are_timms_under_timms_names_and_the_routers() -> None:
    options = dict(qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    layer, dense = make(**options), Attention(H * D, H, **options)
    own = {name: p.shape for name, p in layer.state_dict().items() if not name.startswith("router.")}
    assert own == {name: p.shape for name, p in dense.state_dict().items()}
    assert {name for name in layer.state_dict() if name.startswith("router.")} == {
        "router.routed.weight",
        "router.stage.weight",
    }


def test_a_layer_made_from_a_dense_one_has_its_modules_and_numbers() -> None:
    dense = Attention(H * D, H, qkv_bias=True, attn_drop=0.1, proj_drop=0.2).eval()
    dense.scale = 0.5
    layer = MoHViTAttention.from_dense(dense, moh.MoHConfig(H, 1, 3, "linear"))
    assert layer.qkv is dense.qkv and layer.proj is dense.proj
    assert (layer.scale, layer.attn_drop.p, layer.proj_drop.p) == (0.5, 0.1, 0.2)
    with pytest.raises(ValueError, match="config must have the attention's num_heads = 4, got 2"):
        MoHViTAttention.from_dense(dense, moh.MoHConfig(2, 1, 1))


def test_query_norms_of_normalised_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="router must not be 'query_norm' where queries are normalised"):
        make("query_norm", qk_norm=True, norm_layer=nn.LayerNorm)


def test_dropout_acts_in_training_only() -> None:
    layer, x = make(attn_drop=0.5, proj_drop=0.5), torch.randn(1, 20, H * D)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        torch.testing.assert_close(layer(x), make()(x))
        assert not torch.equal(layer.train()(x), layer(x))
