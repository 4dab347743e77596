"""Promises of routing units in a language model: equal to `reference` in prefill, with cache, padded and in training."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import moh
from moh.models.transformers import MoHLlamaConfig, attention

GROUPS = dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
KINDS = [
    pytest.param(dict(routing_unit=unit, router=router, **heads), id=f"{unit}-{router}-{name}")
    for unit, sizes in {
        "group_balanced": {"3-of-6": dict(shared_heads=0, active_heads=3), "uneven": dict(
            shared_heads=[[0, 3, 4], 0], active_heads=[3, 3])},
        "kv_group": {"4-of-6": dict(shared_heads=2, active_heads=2), "uneven": dict(
            shared_heads=[[4, 5], 0], active_heads=[2, 2])},
    }.items()
    for router in ("linear", "two_stage", "query_norm")
    for name, heads in sizes.items()
]  # fmt: skip
BACKENDS = ["default", "grouped"]


@pytest.fixture
def model(tiny_model, request):
    return tiny_model(**GROUPS | request.param)


def eager(model, *args, **kwargs):
    """The definition's output."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(*args, **kwargs)
    finally:
        model.set_attn_implementation(before)


every_kind = pytest.mark.parametrize("model", KINDS, indirect=True)


def choose_grouped(model) -> None:
    """Sets the backend by name, if it handles the unit."""
    if model.config.routing_unit == "group_balanced":
        model.set_attn_implementation("moh_grouped")


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_prefill_is_that_of_the_reference(model, tokens, backend):
    if backend == "grouped":
        choose_grouped(model)
    torch.testing.assert_close(model(tokens).logits, eager(model, tokens).logits, rtol=1e-4, atol=2e-5)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    got, expected = model(tokens, attention_mask=mask).logits, eager(model, tokens, attention_mask=mask).logits
    torch.testing.assert_close(got[:, 4:], expected[:, 4:], rtol=1e-4, atol=2e-5)


@every_kind
@pytest.mark.parametrize("backend", ["default", "grouped", "operator-off", "static-cache"])
@torch.no_grad()
def test_decoding_with_the_cache_is_the_full_forward_pass(model, tokens, monkeypatch, backend):
    full = eager(model, tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=16) if backend == "static-cache" else None
    cache = model(tokens[:, :7], past_key_values=cache, use_cache=True).past_key_values
    if backend == "grouped":
        choose_grouped(model)
    if backend == "operator-off":
        monkeypatch.setattr(attention, "decode", lambda *_: None)
    for t in range(7, 12):
        step = model(tokens[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(step, full[:, t : t + 1], rtol=1e-4, atol=2e-5)


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_left_padding_changes_nothing_in_decoding(model, tokens, backend):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    full = eager(model, tokens, attention_mask=mask, position_ids=positions).logits
    cache = model(
        tokens[:, :11], attention_mask=mask[:, :11], position_ids=positions[:, :11], use_cache=True
    ).past_key_values
    if backend == "grouped":
        choose_grouped(model)
    last = model(tokens[:, 11:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 11:]).logits
    torch.testing.assert_close(last, full[:, 11:], rtol=1e-4, atol=2e-5)


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_reference(model, tokens, backend):
    model.config.router_aux_loss_coef = 0.01
    if backend == "grouped":
        choose_grouped(model)

    def gradients(run) -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(model, tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got, expected = gradients(lambda m, *a, **k: m(*a, **k)), gradients(eager)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7, msg=name)


@every_kind
@torch.no_grad()
def test_saving_and_loading_keeps_the_unit(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_configs() == model.config.layer_configs()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_group_balanced_model_compiles_to_one_graph(tiny_model, tokens):
    torch.compiler.reset()
    heads = dict(shared_heads=0, active_heads=3, router="linear", routing_unit="group_balanced")
    model = tiny_model(**GROUPS, **heads, attn_implementation="moh_grouped", num_hidden_layers=1)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    got = compiled(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("model", [k for k in KINDS if "linear" in k.id], indirect=True)
@torch.no_grad()
def test_the_share_is_what_tokens_use(model, tokens):
    with moh.record_routing(model) as routing:
        model(tokens)
    assert routing.share() == pytest.approx(model.config.share)


@pytest.mark.parametrize("unit", ["group_balanced", "kv_group"])
def test_a_model_tells_the_attention_what_its_tokens_use(tiny_model, tokens, monkeypatch, unit):
    model = tiny_model(**GROUPS, routing_unit=unit, shared_heads=0, active_heads=6)
    moh.set_active_heads(model, 3 if unit == "group_balanced" else 2)
    seen = []
    original = attention.moh_attention

    def noted(*args, **kwargs):
        seen.append(kwargs["heads_per_group"])
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "moh_attention", noted)
    model(tokens)
    assert seen == [1 if unit == "group_balanced" else None] * 2


@pytest.mark.parametrize(
    "unit, shared, active, message",
    [
        pytest.param("group_balanced", 1, 3, "layer 0: shared_heads must be a multiple of kv_heads = 3", id="shared"),
        pytest.param(
            "kv_group", 2, 3, "layer 0: active_heads must be a multiple of num_heads / kv_heads = 2", id="active"
        ),
        pytest.param("group", 2, 2, "routing_unit must be one of 'head', 'group_balanced', 'kv_group', got", id="unit"),
    ],
)
def test_heads_that_the_unit_does_not_allow_are_refused(tiny_config, unit, shared, active, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**GROUPS, routing_unit=unit, shared_heads=shared, active_heads=active)


def test_single_heads_are_chosen_by_default():
    assert MoHLlamaConfig().routing_unit == "head"
