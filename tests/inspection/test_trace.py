"""Promises of `trace`: gates of the router, contributions of the definition, for MoH and dense layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moh
from moh import MoHAttention
from moh.conversion.passes import head_contributions
from moh.inspection.trace import trace
from moh.models.transformers.families import known_families


def explicit(layer: MoHAttention, x: torch.Tensor) -> torch.Tensor:
    """`||g_i H_i W_O^i||` head by head, from all heads."""
    gates = layer.router(x).gates
    q, k, v = (
        p(x).view(*x.shape[:2], layer.num_heads, -1).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, H, N, D]
    parts = layer.proj.weight.view(layer.dim, layer.num_heads, -1)  # [C, H, D]
    return torch.stack(
        [(gates[..., i : i + 1] * heads[:, i] @ parts[:, i].T).norm(dim=-1) for i in range(layer.num_heads)], dim=-1
    )


@pytest.mark.parametrize("tokens", [5, 80], ids=["dense_projections", "sparse_projections"])
def test_gates_and_contributions_are_those_of_the_definition(tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[MoHAttention(32, 8, shared_heads=1, active_heads=2) for _ in range(2)])
    x = torch.randn(2, tokens, 32)
    first, second = trace(model, lambda: model(x))
    with moh.record_routing(model) as routing, torch.no_grad():
        model(x)
    assert [first.name, second.name] == ["0", "1"]
    for layer, (_, info) in zip((first, second), routing, strict=True):
        assert torch.equal(layer.gates != 0, info.active)
        torch.testing.assert_close(layer.gates, info.gates)  # hooks make steps, which may round otherwise
    assert torch.equal(first.contributions != 0, first.gates != 0)
    torch.testing.assert_close(first.contributions, explicit(model[0], x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(second.contributions, explicit(model[1], model[0](x)), rtol=1e-4, atol=1e-5)


def test_nothing_stays_in_the_model_even_after_an_error() -> None:
    model = nn.Sequential(MoHAttention(8, 2, shared_heads=1, active_heads=1)).train()
    with pytest.raises(RuntimeError, match="stop"):
        trace(model, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model.training
    assert not model[0].proj._forward_pre_hooks and not model[0].router._recorders


def test_a_dense_language_model_uses_every_head(base_dir) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    ids = torch.arange(6)[None]
    layers = trace(model, lambda: model(ids))
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        assert layer.config is None
        assert layer.gates.shape == layer.contributions.shape == (1, 6, model.config.num_attention_heads)
        assert (layer.gates == 1).all() and (layer.contributions > 0).all()


@pytest.mark.parametrize("model_type", [family.model_type for family in known_families()])
@pytest.mark.parametrize("kind", ["dense", "MoH"])
def test_every_family_is_traced(model_type: str, kind: str) -> None:
    from family_cases import BY_TYPE, IMAGES, SIZES, dense_model, images, inputs_of, token_ids

    if model_type not in BY_TYPE:
        pytest.skip("this version of transformers is too old for the family")
    dense = dense_model(model_type)
    heads = SIZES["num_attention_heads"]
    model = dense
    if kind == "MoH":
        calibration = images() if model_type in IMAGES else token_ids()
        how = dict(shared_heads=heads // 2, active_heads=1, calibration=calibration, allocation="even", router="linear")
        model = moh.convert(dense, refit_output=False, progress=False, **how)
    inputs = inputs_of(model_type, count=2)
    patches = {"deit": 18, "dinov2_with_registers": 20}.get(model_type, 17)  # 4 x 4, the class token and others
    tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else patches
    layers = trace(model, lambda: model(**inputs))
    assert len(layers) == SIZES["num_hidden_layers"]
    for layer in layers:
        assert layer.contributions.shape == (2, tokens, heads)
        assert torch.equal(layer.contributions > 0, layer.gates > 0)
        assert layer.gates.sum(-1).unique().tolist() == [heads if kind == "dense" else heads // 2 + 1]


def test_contributions_are_lengths_of_each_heads_part() -> None:
    torch.manual_seed(0)
    heads, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    got = head_contributions(heads.flatten(0, 1), weight, 4).view(2, 3, 4)
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(got[..., head], (heads[..., part] @ weight[:, part].T).norm(dim=-1))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="model has no attention layers with an output projection named o_proj, proj"):
        trace(nn.Linear(2, 2), lambda: None)
