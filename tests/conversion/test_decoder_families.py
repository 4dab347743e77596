"""Promises of every decoder: any cache and beams, other settings of its attention, its classifiers, and one W_O per share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import moh
from moh import convert, record_routing

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import BY_TYPE, DECODERS, dense_model, inputs_of, left_padded, token_ids

ALL_HEADS = dict(shared_heads=1, active_heads=3)
SOME_HEADS = dict(shared_heads=1, active_heads=1)
ROPE = dict(rope_type="default", rope_theta=1e4)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3-sees-both-sides": ("gemma3_text", dict(use_bidirectional_attention=True)),
    "gemma3-scores-not-capped": ("gemma3_text", dict(attn_logit_softcapping=1.0, final_logit_softcapping=2.0)),
    "phi-norms": ("phi", dict(qk_layernorm=True)),
    "olmo2-biases-no-groups": ("olmo2", dict(attention_bias=True, num_key_value_heads=4)),
    "granite-biases": ("granite", dict(attention_bias=True)),
    "cohere-no-norms": ("cohere", dict(use_qk_norm=False)),
    "cohere2-full-layers-alone": ("cohere2", dict(layer_types=["full_attention"] * 2)),
    "starcoder2-no-biases": ("starcoder2", dict(use_bias=False)),
    "gpt_neox-sequential": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False)),
    "gpt_neox-all-rotated": ("gpt_neox", dict(rope_parameters=dict(**ROPE, partial_rotary_factor=1.0))),
}
CLASSIFIERS = [
    pytest.param(t, head, id=f"{t}-{head}")
    for t in DECODERS
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    if f"AutoModelFor{head}" in BY_TYPE[t].models
]


needs_lfm3 = pytest.mark.skipif("lfm3" not in BY_TYPE, reason="this transformers has no LFM3")


def converted(dense: Any, **options: Any) -> Any:
    return convert(dense, **dict(router="linear", calibration=token_ids(), progress=False) | options)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def texts(model: Any, *caches: dict[str, Any]) -> list[list[list[int]]]:
    """The tokens after left-padded prompts with each of these caches, greedy and by beams."""
    inputs = left_padded(token_ids(2, 9)) | dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    return [model.generate(**inputs, **cache, num_beams=beams).tolist() for cache in caches for beams in (1, 3)]


NO_CACHE = dict(use_cache=False)
CACHES = [dict(cache_implementation=kind) for kind in ("dynamic", "static")]  # of sliding layers if the model has any


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_with_all_heads_active_beams_and_static_caches_give_the_originals_text(model_type) -> None:
    dense = dense_model(model_type)
    assert texts(converted(dense, **ALL_HEADS), *CACHES) == texts(dense, *CACHES)


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_with_some_heads_every_implementation_and_cache_gives_the_same_text(model_type) -> None:
    model = converted(dense_model(model_type), **SOME_HEADS)
    expected = texts(model, NO_CACHE)
    for implementation in ("moh", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert texts(model, *CACHES) == expected * len(CACHES)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_other_settings_of_the_attention_are_the_originals_and_every_implementation_the_same(variant) -> None:
    model_type, options = VARIANTS[variant]
    dense = dense_model(model_type, **options)
    inputs = inputs_of(model_type, 4, 40)
    assert_same(converted(dense, **ALL_HEADS)(**inputs).logits, dense(**inputs).logits)
    model = converted(dense, **SOME_HEADS)
    expected = model(**inputs).logits
    for implementation in ("eager", "sdpa", "moh_reference"):
        model.set_attn_implementation(implementation)
        assert_same(model(**inputs).logits, expected)


@pytest.mark.parametrize("allocation", ["even", "sensitivity"])
@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_a_model_converted_for_several_shares_is_the_original_at_the_full_one(model_type, allocation) -> None:
    dense = dense_model(model_type)
    model = converted(dense, shares=[1.0, 0.5], allocation=allocation, **SOME_HEADS)
    ids = token_ids(4, 16)
    changed = model(ids).logits
    kept = converted(dense, refit_output=False, allocation=allocation, **SOME_HEADS)
    assert not torch.allclose(changed, kept(ids).logits, atol=1e-3)
    moh.set_active_heads(model, 1.0)
    assert_same(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(("model_type", "head"), CLASSIFIERS)
def test_a_classifiers_loss_holds_the_balance_term_and_trains_the_routers(model_type, head) -> None:
    dense = dense_model(model_type, f"AutoModelFor{head}")
    model = converted(dense, router="two_stage", router_aux_loss_coef=0.5, **SOME_HEADS)
    ids = token_ids(4, 12)
    first = torch.arange(4) % 2
    labels = {
        "SequenceClassification": dict(labels=first),
        "TokenClassification": dict(labels=ids % 2),
        "QuestionAnswering": dict(start_positions=first, end_positions=first + 2),
    }[head]
    with record_routing(model) as routing:
        outputs = model(ids, **labels)
    assert torch.allclose(outputs.aux_loss, routing.balance_loss()) and outputs.aux_loss > 0
    model.config.router_aux_loss_coef = 0.0
    assert torch.allclose(outputs.loss, model(ids, **labels).loss + 0.5 * outputs.aux_loss)
    outputs.loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "router" in n)


@needs_lfm3
@pytest.mark.parametrize("implementation", ["moh", "eager"])
@torch.no_grad()
def test_a_head_that_the_models_own_gate_closes_is_not_chosen_and_the_gate_still_weights_the_others(
    implementation,
) -> None:
    dense = dense_model("lfm3")
    dense.model.embed_tokens.weight[:, 0] = 30.0  # a channel that is positive in every layer's input
    for layer in dense.model.layers[1:]:
        layer.self_attn.g_proj.weight[2] = 0.0
        layer.self_attn.g_proj.weight[2, 0] = -30.0
    model = converted(dense, refit_output=False, allocation="even", **SOME_HEADS)
    model.set_attn_implementation(implementation)
    ids = token_ids(4, 12)
    with record_routing(model) as routing:
        before = model(ids).logits
    assert len(routing) == 2 and not any(info.active[..., 2].any() for _, info in routing)
    for layer in model.model.layers[1:]:
        layer.self_attn.g_proj.weight.mul_(0.5)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


@needs_lfm3
@torch.no_grad()
def test_gates_of_the_models_own_that_round_to_0_are_computed_alike_by_every_implementation() -> None:
    model = converted(dense_model("lfm3"), routing_unit="group_balanced", shared_heads=0, active_heads=2)
    for layer in model.model.layers[1:]:
        layer.self_attn.g_proj.weight.mul_(1e4)
    ids = token_ids(4, 12)
    expected = model(ids).logits
    for implementation in ("moh_grouped", "moh_reference", "eager"):
        model.set_attn_implementation(implementation)
        assert_same(model(ids).logits, expected)


@needs_lfm3
def test_a_hybrids_layers_without_heads_have_no_entry_in_its_configuration() -> None:
    from moh.models.transformers import MoHLfm3Config

    sizes = dict(num_hidden_layers=3, layer_types=["conv", "sliding_attention", "full_attention"])
    config = MoHLfm3Config(**sizes, active_heads=[2, 3])
    assert [layer.active_heads for layer in config.layer_configs()] == [2, 3]
    with pytest.raises(ValueError, match=r"active_heads must be .* one entry per layer \(2\), got 3 entries"):
        MoHLfm3Config(**sizes, active_heads=[2, 3, 4])


def test_a_family_that_the_installed_transformers_lacks_is_refused_and_its_auto_classes_know_nothing(
    monkeypatch,
) -> None:
    from moh.models.transformers import families, models

    monkeypatch.setattr(families, "find_spec", lambda name: None if name.endswith(".lfm3") else name)
    assert [f.model_type for f in families.FAMILIES if f not in families.known_families()] == ["lfm3"]
    with pytest.raises(ImportError, match="MoHLfm3Model needs a transformers that has models of type 'lfm3'"):
        models.make_class("MoHLfm3Model")
