"""Promises of every family: with all heads active it is the original; it is saved, loaded, adapted and trained as one."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import transformers

import moh.models.transformers
from moh import convert, record_routing

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers beside them

from family_cases import BY_TYPE, DECODERS, TRAINED_HEAD, dense_model, left_padded, token_ids

ALL = list(BY_TYPE)
HEADED = [
    pytest.param(t, auto, id=f"{t}-{auto.removeprefix('AutoModel').removeprefix('For') or 'bare'}")
    for t, family in BY_TYPE.items()
    for auto in family.models
]
BARE_AND_TRAINED = [case for case in HEADED if case.values[1] in ("AutoModel", *TRAINED_HEAD.values())]
ALL_HEADS = dict(shared_heads=1, active_heads=3)
SOME_HEADS = dict(shared_heads=1, active_heads=1)


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("model_type", "auto"), HEADED)
@torch.no_grad()
def test_with_all_heads_active_every_head_of_the_family_gives_the_originals_output(model_type, auto) -> None:
    dense = dense_model(model_type, auto)
    model = convert(dense, router="linear", calibration=token_ids(), progress=False, **ALL_HEADS)
    padded = left_padded(token_ids(2, 12))
    real = padded["attention_mask"].bool()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        if model_type != "gemma2":  # transformers' own knows eager alone
            dense.set_attn_implementation(implementation)
        for inputs in (dict(input_ids=padded["input_ids"]), padded):
            got, expected = model(**inputs)[0], dense(**inputs)[0]
            if got.dim() == 3:
                got, expected = got[real], expected[real]
            assert_same(got, expected)
    assert not model.training and model.config.share == 1


@pytest.mark.parametrize("model_type", ALL)
def test_with_all_heads_active_the_gradients_are_the_originals(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, router="linear", calibration=token_ids(), progress=False, **ALL_HEADS)
    inputs = left_padded(token_ids(2, 12))
    real = inputs["attention_mask"].bool()
    for m in (model, dense):
        m(**inputs).logits[real].square().mean().backward()
    for name, parameter in dense.named_parameters():
        expected = parameter.grad
        got = model.get_parameter(name).grad
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 + 1e-5 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_greedy_text_with_a_cache_and_left_padding_is_the_originals(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, router="linear", calibration=token_ids(), progress=False, **ALL_HEADS)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    inputs = left_padded(token_ids(2, 12))
    assert model.generate(**inputs, **options).tolist() == dense.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_with_some_heads_the_cache_changes_nothing(model_type) -> None:
    model = convert(dense_model(model_type), router="linear", calibration=token_ids(), progress=False, **SOME_HEADS)
    inputs = left_padded(token_ids(2, 12)) | dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert model.generate(**inputs, use_cache=True).tolist() == model.generate(**inputs, use_cache=False).tolist()


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_some_heads_are_the_definition_and_not_the_original(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, router="linear", calibration=token_ids(), progress=False, **SOME_HEADS)
    ids = token_ids(3, 40)  # enough tokens for the products of the active heads alone
    with record_routing(model) as routing:
        fast = model(ids).logits
    assert routing.share() == 0.5 and len(routing) == 2
    model.set_attn_implementation("eager")
    assert_same(fast, model(ids).logits)
    assert not torch.allclose(fast, dense(ids).logits, atol=1e-2)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_a_two_stage_model_with_all_heads_active_starts_near_the_original(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, router="two_stage", calibration=token_ids(), progress=False, shared_heads=2, active_heads=2)
    with record_routing(model) as routing:
        got = model(token_ids(3)).logits
    assert_same(got, dense(token_ids(3)).logits, tolerance=0.1)
    for _, info in routing:
        assert torch.allclose(info.gates, torch.ones(()), atol=0.05)
        assert not torch.equal(info.gates, torch.ones_like(info.gates))


@pytest.mark.parametrize("model_type", [t for t in ALL if not BY_TYPE[t].query_norm or t == "phi"])
@torch.no_grad()
def test_the_query_norm_router_needs_no_calibration(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, router="query_norm", **ALL_HEADS)
    assert_same(model(token_ids(3)).logits, dense(token_ids(3)).logits)
    assert model.state_dict().keys() == dense.state_dict().keys()
    model.set_active_heads(1)
    with record_routing(model) as routing:
        model(token_ids(3))
    assert routing.share() == 0.5


@pytest.mark.parametrize("model_type", ALL)
def test_heads_are_shared_out_and_the_output_refitted_from_calibration_and_the_original_stays(model_type) -> None:
    dense = dense_model(model_type).train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    settings = dense.config.to_dict()
    model = convert(
        dense,
        calibration=token_ids(),
        allocation="sensitivity",
        refit_output=True,
        progress=False,
        shared_heads=1,
        active_heads=2,
    )
    ids = token_ids(16)
    with torch.no_grad():
        plain = dict(allocation="even", refit_output=False)
        kept = convert(dense, calibration=token_ids(), progress=False, shared_heads=1, active_heads=2, **plain)
        errors = [(m(ids).logits - dense.eval()(ids).logits).square().mean() for m in (model, kept)]
    assert errors[0] < errors[1]
    assert dense.config.to_dict() == settings
    assert all(p.grad is None and p.requires_grad for p in dense.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in dense.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    ours, theirs = ({t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (model, dense))
    assert not ours & theirs


@pytest.mark.parametrize(("model_type", "auto"), BARE_AND_TRAINED)
@torch.no_grad()
def test_the_auto_class_loads_what_was_saved(model_type, auto, tmp_path: Path) -> None:
    dense = dense_model(model_type, auto)
    model = convert(
        dense, router="linear", calibration=token_ids(), progress=False, shared_heads=1, active_heads=[1, 2]
    )
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"moh_{model_type}"
    assert saved["architectures"] == [f"MoH{type(dense).__name__}"]
    loaded, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) is getattr(moh.models.transformers, f"MoH{type(dense).__name__}")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.config.active_heads == [1, 2]
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    inputs = left_padded(token_ids(2, 12))
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert pickle.loads(pickle.dumps(type(model))) is type(model)


@pytest.mark.parametrize(
    ("model_type", "auto"), [("qwen3", "AutoModelForCausalLM"), ("gpt2", "AutoModel"), ("bert", "AutoModel")]
)
@torch.no_grad()
def test_a_directory_is_converted_like_the_model_that_lies_there(model_type, auto, tmp_path: Path) -> None:
    dense = dense_model(model_type, auto)
    dense.save_pretrained(tmp_path)
    options = dict(router="linear", calibration=token_ids(), progress=False, **SOME_HEADS)
    from_directory, expected = convert(tmp_path, **options), convert(dense, **options)
    assert type(from_directory) is type(expected)
    ids = token_ids(2, 12)
    assert torch.equal(from_directory(ids)[0], expected(ids)[0])


@pytest.mark.parametrize("model_type", ALL)
def test_only_routers_are_added_to_the_tensors(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, calibration=token_ids(), progress=False, refit_output=False, **SOME_HEADS)
    old, new = dense.state_dict(), model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(".router.contribution." in name for name in new.keys() - old.keys())
    assert len(new) == len(old) + 4


@pytest.mark.parametrize("model_type", ALL)
def test_a_lora_starts_as_the_model_and_trains_alone(model_type) -> None:
    peft = pytest.importorskip("peft")
    family = BY_TYPE[model_type]
    model = convert(dense_model(model_type), calibration=token_ids(), progress=False, **SOME_HEADS)
    ids = token_ids(4)
    with torch.no_grad():
        before = model(ids).logits
    names = [family.fused] if family.fused else [family.queries, family.keys, family.values]
    modules = [*names, family.output]
    regex = rf".*[.]{family.attention_of_layer}[.].*({'|'.join(m.replace('.', '[.]') for m in modules)})"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=regex)).eval()
    with torch.no_grad():
        assert_same(adapted(ids).logits, before)
    adapted.train()
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * len(modules) and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = adapted(ids, labels=ids).loss
        after.backward()
    assert after < loss
    merged = adapted.merge_and_unload().eval()
    with torch.no_grad():
        assert not torch.allclose(merged(ids).logits, before, atol=1e-4)


@pytest.mark.parametrize("model_type", ALL)
def test_the_loss_holds_the_balance_term_of_real_tokens_and_trains_the_routers(model_type) -> None:
    model = convert(
        dense_model(model_type),
        router="two_stage",
        calibration=token_ids(),
        progress=False,
        router_aux_loss_coef=0.5,
        shared_heads=1,
        active_heads=1,
    )
    inputs = left_padded(token_ids(4, 12))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with record_routing(model) as routing:
        outputs = model(**inputs, labels=labels)
    balance = routing.balance_loss(inputs["attention_mask"])
    assert torch.allclose(outputs.aux_loss, balance) and balance > 0
    model.config.router_aux_loss_coef = 0.0
    plain = model(**inputs, labels=labels)
    assert torch.allclose(outputs.loss, plain.loss + 0.5 * balance)
    assert "aux_loss" not in plain
    assert model(**inputs, labels=labels, return_dict=False)[0] == plain.loss
    model.config.router_aux_loss_coef = 0.5
    model.train()(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "router" in n)


@pytest.mark.parametrize("unit", ["group_balanced", "kv_group"])
@pytest.mark.parametrize("model_type", [t for t in DECODERS if t not in ("gpt2", "opt")])
@torch.no_grad()
def test_groups_can_be_what_a_token_chooses(model_type, unit) -> None:
    model = convert(
        dense_model(model_type),
        calibration=token_ids(),
        progress=False,
        routing_unit=unit,
        shared_heads=0,
        active_heads=2,
    )
    ids = token_ids(2, 12)
    with record_routing(model) as routing:
        got = model(ids).logits
    per_group = [info.active.unflatten(-1, (2, 2)).sum(-1) for _, info in routing]  # [B, N, Hkv]
    allowed = {1} if unit == "group_balanced" else {0, 2}
    assert all(set(counts.unique().tolist()) <= allowed for counts in per_group)
    model.set_attn_implementation("eager")
    assert_same(got, model(ids).logits)


def test_a_model_is_made_from_its_configuration_and_its_routers_are_new() -> None:
    config = transformers.AutoConfig.for_model(
        "moh_gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, shared_heads=1, active_heads=1
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = [layer.attn.router.routed.weight for layer in model.transformer.h]
    assert all(0.01 < float(w.detach().std()) < 0.03 for w in weights)  # GPT-2's own initialisation
    assert not torch.equal(*weights)
    assert model.set_active_heads(3) == 1.0


def test_attention_weights_are_not_promised() -> None:
    model = convert(dense_model("opt"), router="query_norm", **SOME_HEADS)
    outputs = model(token_ids(2, 8), output_attentions=True, output_hidden_states=True)
    assert not outputs.attentions
    assert len(outputs.hidden_states) == 3
