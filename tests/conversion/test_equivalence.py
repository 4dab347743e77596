"""Promise: with all heads active a converted model is the original, and the original stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moh import convert, record_routing

FAMILIES = ["Llama", "Mistral", "Qwen2"]


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["linear", "query_norm"])
@torch.no_grad()
def test_with_all_heads_active_logits_and_greedy_text_are_the_originals(make_dense, tokens, family, router) -> None:
    dense = make_dense(family)
    calibration = tokens if router == "linear" else None
    model = convert(dense, shared_heads=1, active_heads=3, router=router, calibration=calibration)
    assert_same(model(tokens[:3]).logits, dense(tokens[:3]).logits)
    options = dict(attention_mask=torch.ones_like(tokens[:2]), max_new_tokens=12, do_sample=False)
    assert model.generate(tokens[:2], **options).tolist() == dense.generate(tokens[:2], **options).tolist()
    assert not model.training and model.config.share == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_two_stage_model_with_all_heads_active_starts_near_the_original(make_dense, tokens, family) -> None:
    dense = make_dense(family)
    model = convert(dense, shared_heads=2, active_heads=2, router="two_stage", calibration=tokens)
    with record_routing(model) as routing:
        got = model(tokens[:3]).logits
    assert_same(got, dense(tokens[:3]).logits, tolerance=0.05)
    for _, info in routing:
        assert torch.allclose(info.gates, torch.ones(()), atol=0.05)
        assert not torch.equal(info.gates, torch.ones_like(info.gates))


@torch.no_grad()
def test_a_two_stage_model_activates_heads_roughly_by_contribution(make_dense, tokens, watch) -> None:
    dense = make_dense()
    model = convert(dense, shared_heads=0, active_heads=1, router="two_stage", calibration=tokens)
    for layer, original, seen in zip(model.model.layers, dense.model.layers, watch(dense, tokens), strict=True):
        gates = layer.self_attn.router(seen.x.float()[None]).gates[0]
        parts = original.self_attn.o_proj.weight.double().unflatten(-1, (4, -1))  # [C, H, D]
        contributions = torch.einsum("thd,chd->thc", seen.z, parts).norm(dim=-1)
        hits = (contributions.argmax(-1) == gates.argmax(-1)).double().mean()
        assert hits > 0.4  # 0.25 by chance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_passed_model_is_unchanged_and_shares_no_storage(make_dense, tokens, family) -> None:
    dense = make_dense(family).train()
    frozen = dense.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    settings = dense.config.to_dict()
    model = convert(
        dense, shared_heads=1, active_heads=2, calibration=tokens, allocation="sensitivity", refit_output=True
    )
    assert dense.training and dense.config.to_dict() == settings
    assert [p for p in dense.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in dense.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in dense.modules())
    assert before.keys() == dense.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    ours, theirs = ({t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (model, dense))
    assert not ours & theirs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_and_the_generation_settings_are_the_originals(make_dense, tokens, dtype) -> None:
    dense = make_dense().to(dtype)
    dense.generation_config.max_new_tokens = 7
    model = convert(dense, shared_heads=1, active_heads=1, calibration=tokens)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config is not dense.generation_config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["linear", "query_norm", "two_stage"])
@torch.no_grad()
def test_a_saved_model_loads_with_the_auto_class_and_gives_the_same_logits(
    make_dense, tokens, tmp_path: Path, family, router
) -> None:
    calibration = None if router == "query_norm" else tokens
    model = convert(make_dense(family), shared_heads=1, active_heads=[1, 2], router=router, calibration=calibration)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.config.active_heads == [1, 2]
    assert torch.equal(loaded(tokens[:3]).logits, model(tokens[:3]).logits)


@torch.no_grad()
def test_a_path_is_converted_like_the_model_that_lies_there(base_dir: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(base_dir)
    options = dict(shared_heads=1, active_heads=1, router="query_norm")
    ids = torch.arange(20)[None]
    expected = convert(dense, **options)(ids).logits
    assert torch.equal(convert(base_dir, **options)(ids).logits, expected)
    assert torch.equal(convert(str(base_dir), **options)(ids).logits, expected)


def test_the_query_norm_router_shares_the_first_heads(make_dense) -> None:
    model = convert(make_dense(), shared_heads=2, active_heads=1, router="query_norm")
    assert [c.shared_indices for c in model.config.layer_configs()] == [(0, 1)] * 2
    model = convert(make_dense(), shared_heads=[3, 1], active_heads=1, router="query_norm")
    assert [c.num_shared for c in model.config.layer_configs()] == [2, 2]
    assert [c.shared_indices for c in model.config.layer_configs()] == [(1, 3)] * 2
