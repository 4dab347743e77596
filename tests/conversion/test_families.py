"""Promises of every family: equal to the original with all heads active; saves, loads, adapts and trains like it."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import transformers

import moh.models.transformers
from moh import convert, record_routing
from moh.conversion.transformers import adapter

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import (
    ALL,
    BY_TYPE,
    DECODERS,
    ENCODERS,
    IMAGES,
    NO_DROPOUT,
    OPTIONS,
    TRAINED_HEAD,
    dense_model,
    images,
    inputs_of,
    left_padded,
    token_ids,
    with_labels,
)

HEADED = [
    pytest.param(t, auto, id=f"{t}-{auto.removeprefix('AutoModel').removeprefix('For') or 'bare'}")
    for t, family in BY_TYPE.items()
    for auto in family.models
]
BARE_AND_TRAINED = [case for case in HEADED if case.values[1] in ("AutoModel", *TRAINED_HEAD.values())]
ALL_HEADS = dict(shared_heads=1, active_heads=3)
SOME_HEADS = dict(shared_heads=1, active_heads=1)


def converted(dense: Any, **options: Any) -> Any:
    """Converted with some or all heads, by default with the contribution router."""
    calibration = images() if dense.config.model_type in IMAGES else token_ids()
    return convert(dense, **dict(router="linear", calibration=calibration, progress=False) | options)


_CONVERTED: dict[str, Any] = {}


def converted_model(
    model_type: str, auto: str | None = None, *, sizes: dict[str, Any] | None = None, **options: Any
) -> Any:
    """`converted(dense_model(model_type, auto, **sizes), **options)`: a copy, as many tests need the same."""
    key = repr((model_type, auto or TRAINED_HEAD[model_type], sizes, sorted(options.items())))
    if key not in _CONVERTED:
        torch.manual_seed(0)
        _CONVERTED[key] = converted(dense_model(model_type, auto, **sizes or {}), **options)
    return copy.deepcopy(_CONVERTED[key])


def real_tokens(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output without padding tokens."""
    return output[inputs["attention_mask"].bool()] if output.dim() == 3 and "attention_mask" in inputs else output


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("model_type", "auto"), HEADED)
@torch.no_grad()
def test_with_all_heads_active_every_head_of_the_family_gives_the_originals_output(model_type, auto) -> None:
    dense, model = dense_model(model_type, auto), converted_model(model_type, auto, **ALL_HEADS)
    for implementation in ("moh", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        if model_type != "gemma2" and implementation != "moh":  # transformers' own model has eager only
            dense.set_attn_implementation(implementation)
        for inputs in (inputs_of(model_type), inputs_of(model_type, padded=True)):
            if auto == "AutoModelForMultipleChoice":
                inputs = {name: tensor[None] for name, tensor in inputs.items()}  # [1, choices, N]
            assert_same(*(real_tokens(m(**inputs)[0], inputs) for m in (model, dense)))
    assert not model.training and model.config.share == 1


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_an_engines_attention_is_called_as_supports_attention_backend_promises(model_type, monkeypatch) -> None:
    model = converted_model(model_type, **SOME_HEADS)
    assert model._supports_attention_backend
    called = []

    def engine(module, *args, **kwargs):
        called.append(module)
        return transformers.AttentionInterface()["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "engine", engine)
    masks = transformers.AttentionMaskInterface
    monkeypatch.setitem(masks._global_mapping, "engine", masks()["sdpa"])
    inputs = inputs_of(model_type, padded=True)
    expected = model(**inputs)[0]
    model.set_attn_implementation("engine")
    assert_same(*(real_tokens(output, inputs) for output in (model(**inputs)[0], expected)))
    assert len(called) == 2


@pytest.mark.parametrize("model_type", ALL)
def test_with_all_heads_active_the_gradients_are_the_originals(model_type) -> None:
    dense, model = dense_model(model_type), converted_model(model_type, **ALL_HEADS)
    inputs = inputs_of(model_type, padded=True)
    for m in (model, dense):
        real_tokens(m(**inputs).logits, inputs).square().mean().backward()
    for name, parameter in dense.named_parameters():
        expected = parameter.grad
        got = model.get_parameter(name).grad
        if expected is None:  # the mask token of a model that is given whole images
            assert got is None
            continue
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 + 1e-5 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_greedy_text_with_a_cache_and_left_padding_is_the_originals(model_type) -> None:
    dense, model = dense_model(model_type), converted_model(model_type, **ALL_HEADS)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    inputs = left_padded(token_ids(2, 12))
    assert model.generate(**inputs, **options).tolist() == dense.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_with_some_heads_the_cache_changes_nothing(model_type) -> None:
    model = converted_model(model_type, **SOME_HEADS)
    inputs = left_padded(token_ids(2, 12)) | dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert model.generate(**inputs, use_cache=True).tolist() == model.generate(**inputs, use_cache=False).tolist()


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_some_heads_are_the_definition_and_not_the_original(model_type) -> None:
    dense, model = dense_model(model_type), converted_model(model_type, **SOME_HEADS)
    inputs = inputs_of(model_type, 4, 40)  # enough tokens for products of active heads only
    with record_routing(model) as routing:
        fast = model(**inputs).logits
    assert routing.share() == 0.5 == model.config.share and len(routing) == 2
    model.set_attn_implementation("eager")
    assert_same(fast, model(**inputs).logits)
    assert not torch.allclose(fast, dense(**inputs).logits, atol=1e-2)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_a_two_stage_model_with_all_heads_active_starts_near_the_original(model_type) -> None:
    dense = dense_model(model_type)
    model = converted_model(model_type, router="two_stage", shared_heads=2, active_heads=2)
    inputs = inputs_of(model_type)
    with record_routing(model) as routing:
        got = model(**inputs).logits
    assert_same(got, dense(**inputs).logits, tolerance=0.1)
    for _, info in routing:
        assert torch.allclose(info.gates, torch.ones(()), atol=0.05)
        assert not torch.equal(info.gates, torch.ones_like(info.gates))


@pytest.mark.parametrize("model_type", [t for t in ALL if not BY_TYPE[t].query_norm or t == "phi"])
@torch.no_grad()
def test_the_query_norm_router_needs_no_calibration(model_type) -> None:
    dense = dense_model(model_type)
    model = convert(dense, router="query_norm", **ALL_HEADS)
    inputs = inputs_of(model_type)
    assert_same(model(**inputs).logits, dense(**inputs).logits)
    assert model.state_dict().keys() == dense.state_dict().keys()
    model.set_active_heads(1)
    with record_routing(model) as routing:
        model(**inputs)
    assert routing.share() == 0.5


@pytest.mark.parametrize("model_type", ALL)
def test_heads_are_shared_out_and_the_output_refitted_from_calibration_and_the_original_stays(model_type) -> None:
    dense = dense_model(model_type).train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    settings = dense.config.to_dict()
    model = converted(dense, allocation="sensitivity", refit_output=True, shared_heads=1, active_heads=2)
    inputs = inputs_of(model_type, 16, 16)
    with torch.no_grad():
        kept = converted(dense, allocation="even", refit_output=False, shared_heads=1, active_heads=2)
        errors = [(m(**inputs).logits - dense.eval()(**inputs).logits).square().mean() for m in (model, kept)]
    assert errors[0] < errors[1]
    assert dense.config.to_dict() == settings
    assert all(p.grad is None and p.requires_grad for p in dense.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in dense.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    ours, theirs = ({t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (model, dense))
    assert not ours & theirs


@pytest.mark.parametrize(("model_type", "auto"), HEADED)
@torch.no_grad()
def test_the_auto_class_loads_what_was_saved(model_type, auto, tmp_path: Path) -> None:
    dense, model = dense_model(model_type, auto), converted_model(model_type, auto, shared_heads=1, active_heads=[1, 2])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"moh_{model_type}"
    assert saved["architectures"] == [f"MoH{type(dense).__name__}"]
    loaded, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) is getattr(moh.models.transformers, f"MoH{type(dense).__name__}")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.config.active_heads == [1, 2]
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    inputs = inputs_of(model_type, padded=True)
    if auto.endswith("MultipleChoice"):
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}  # one choice
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert pickle.loads(pickle.dumps(type(model))) is type(model)


@pytest.mark.parametrize(
    ("model_type", "auto", "name"), [(t, *named) for t in ALL for named in BY_TYPE[t].more_models.items()]
)
@torch.no_grad()
def test_a_second_class_of_an_auto_class_is_converted_and_loaded_where_the_checkpoint_names_it(
    model_type, auto, name, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = getattr(transformers, name)(dense_model(model_type).config).eval()
    inputs = inputs_of(model_type)
    for implementation in ("moh", "sdpa", "eager"):
        model = converted(dense, **ALL_HEADS)
        model.set_attn_implementation(implementation)
        assert_same(model(**inputs).logits, dense(**inputs).logits)
    model = converted(dense, **SOME_HEADS)
    model.save_pretrained(tmp_path)
    assert f"import {auto}\n" in (tmp_path / "README.md").read_text()
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert (
        type(loaded)
        is type(model)
        is getattr(moh.models.transformers, f"MoH{name}")
        is getattr(transformers, f"MoH{name}")
    )
    outputs = loaded(**inputs, output_router_logits=True)
    assert torch.equal(outputs.logits, model(**inputs).logits)
    assert torch.equal(pickle.loads(pickle.dumps(outputs)).logits, outputs.logits)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_models_and_outputs_are_pickled_and_copied(model_type) -> None:
    model = converted_model(model_type, **SOME_HEADS)
    model.config.router_aux_loss_coef = 0.5
    inputs = with_labels(inputs_of(model_type)) | dict(output_router_logits=True)
    expected = model(**inputs)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert torch.equal(other(**inputs).logits, expected.logits)
        other.set_attn_implementation("eager")
        other.set_active_heads(3)
        assert model.config._attn_implementation == "moh" and model.config.share == 0.5
        assert not torch.equal(other(**inputs).logits, expected.logits)
    for outputs in (pickle.loads(pickle.dumps(expected)), copy.deepcopy(expected)):
        assert type(outputs) is type(expected) and outputs.keys() == expected.keys()
        assert torch.equal(outputs.loss, expected.loss) and torch.equal(outputs.aux_loss, expected.aux_loss)


READ = """
import pickle, sys, torch
model, inputs, expected = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    got = model(**inputs)
assert type(got) is type(expected) and torch.equal(got.loss, expected.loss), (got, expected)
"""


@pytest.mark.parametrize("model_type", ["qwen3", "opt", "bert", "xlm-roberta"])  # a part of an OPT has no Auto class
@torch.no_grad()
def test_a_process_that_has_made_none_of_the_classes_reads_them(forks, model_type, tmp_path: Path) -> None:
    model = converted_model(model_type, router_aux_loss_coef=0.5, **SOME_HEADS)
    inputs = with_labels(inputs_of(model_type))
    (tmp_path / "sent").write_bytes(pickle.dumps((model, inputs, model(**inputs))))
    run = forks.run(READ, tmp_path / "sent")
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
    ("model_type", "auto"), [("qwen3", "AutoModelForCausalLM"), ("gpt2", "AutoModel"), ("bert", "AutoModel")]
)
@torch.no_grad()
def test_a_directory_is_converted_like_the_model_that_lies_there(model_type, auto, tmp_path: Path) -> None:
    dense = dense_model(model_type, auto)
    dense.save_pretrained(tmp_path)
    expected = converted(dense, **SOME_HEADS)
    from_directory = convert(tmp_path, router="linear", calibration=token_ids(), progress=False, **SOME_HEADS)
    assert type(from_directory) is type(expected)
    ids = token_ids(2, 12)
    assert torch.equal(from_directory(ids)[0], expected(ids)[0])


@pytest.mark.parametrize("model_type", ALL)
def test_only_routers_are_added_to_the_tensors(model_type) -> None:
    dense, model = dense_model(model_type), converted_model(model_type, refit_output=False, **SOME_HEADS)
    old, new = dense.state_dict(), model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(".router.contribution." in name for name in new.keys() - old.keys())
    assert len(new) == len(old) + 4


@pytest.mark.parametrize("model_type", ALL)
def test_a_lora_starts_as_the_model_and_trains_alone(model_type) -> None:
    peft = pytest.importorskip("peft")
    family = BY_TYPE[model_type]
    model = converted_model(model_type, **SOME_HEADS)
    inputs = with_labels(inputs_of(model_type, 4, 16))
    with torch.no_grad():
        before = model(**inputs).logits
    names = [family.fused] if family.fused else [family.queries, family.keys, family.values]
    modules = [*names, family.output]
    regex = rf".*[.]{family.attention_of_layer}[.].*({'|'.join(m.replace('.', '[.]') for m in modules)})"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=regex)).eval()
    with torch.no_grad():
        assert_same(adapted(**inputs).logits, before)
    adapted.train()
    loss = adapted(**inputs).loss
    loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * len(modules) and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = adapted(**inputs).loss
        after.backward()
    assert after < loss
    merged = adapted.merge_and_unload().eval()
    with torch.no_grad():
        assert not torch.allclose(merged(**inputs).logits, before, atol=1e-4)


@pytest.mark.parametrize("model_type", ALL)
def test_the_loss_holds_the_balance_term_of_real_tokens_and_trains_the_routers(model_type) -> None:
    model = converted_model(model_type, router="two_stage", router_aux_loss_coef=0.5, **SOME_HEADS)
    inputs = with_labels(inputs_of(model_type, 4, padded=True))
    with record_routing(model) as routing:
        outputs = model(**inputs)
    balance = routing.balance_loss(inputs.get("attention_mask"))
    assert torch.allclose(outputs.aux_loss, balance) and balance > 0
    model.config.router_aux_loss_coef = 0.0
    plain = model(**inputs)
    assert torch.allclose(outputs.loss, plain.loss + 0.5 * balance)
    assert "aux_loss" not in plain
    assert model(**inputs, return_dict=False)[0] == plain.loss
    model.config.router_aux_loss_coef = 0.5
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "router" in n)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_balance_term_of_a_multiple_choice_is_of_real_tokens(model_type) -> None:
    dense = dense_model(model_type, "AutoModelForMultipleChoice")
    model = converted(dense, router="two_stage", router_aux_loss_coef=0.5, **SOME_HEADS)
    inputs = inputs_of(model_type, 4, padded=True)
    choices = {name: tensor.view(2, 2, -1) for name, tensor in inputs.items()}
    with record_routing(model) as routing:
        outputs = model(**choices, labels=torch.tensor([0, 1]))
    assert torch.allclose(outputs.aux_loss, routing.balance_loss(inputs["attention_mask"]))
    assert not torch.allclose(outputs.aux_loss, routing.balance_loss())


@pytest.mark.parametrize("model_type", [t for t in ALL if BY_TYPE[t].scale_of_layer])
def test_contributions_count_the_layers_scale(model_type) -> None:
    model = dense_model(model_type)
    first, *_ = adapter(model, "linear", copied=True).attentions
    block = model.base_model.encoder.layer[0]
    assert first.scale is block.layer_scale1.lambda1
    assert torch.equal(first.written, 0.7 * block.attention.o_proj.weight)


@pytest.mark.parametrize("model_type", ALL)
def test_however_many_models_are_inside_each_other_the_balance_loss_counts_once(model_type) -> None:
    model = converted_model(
        model_type, sizes=NO_DROPOUT.get(model_type, {}), router="two_stage", router_aux_loss_coef=0.5, **SOME_HEADS
    ).train()
    inputs = with_labels(inputs_of(model_type))
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    got = torch.autograd.grad(model(**inputs).loss, routers)
    model.config.router_aux_loss_coef = 0.0
    with record_routing(model) as routing:
        loss = model(**inputs).loss
    torch.testing.assert_close(got, torch.autograd.grad(loss + 0.5 * routing.balance_loss(), routers))


@pytest.mark.parametrize("model_type", ALL)
def test_gradient_checkpointing_changes_neither_the_loss_nor_the_gradients(model_type) -> None:
    model = converted_model(
        model_type, sizes=NO_DROPOUT.get(model_type, {}), router="two_stage", router_aux_loss_coef=0.5, **SOME_HEADS
    ).train()
    inputs = with_labels(inputs_of(model_type, padded=True))
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = model(**inputs)
        outputs.loss.backward()
        runs.append((outputs.loss, outputs.aux_loss, {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad()
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize("unit", ["group_balanced", "kv_group"])
@pytest.mark.parametrize("model_type", [t for t in DECODERS if "num_key_value_heads" in OPTIONS[t]])
@torch.no_grad()
def test_groups_can_be_what_a_token_chooses(model_type, unit) -> None:
    model = converted_model(model_type, routing_unit=unit, shared_heads=0, active_heads=2)
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


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_attention_weights_are_given_by_eager(model_type) -> None:
    dense, model = dense_model(model_type), converted_model(model_type, **ALL_HEADS)
    inputs = inputs_of(model_type) | dict(output_attentions=True, output_hidden_states=True)
    outputs = model(**inputs)
    assert not outputs.attentions  # ours computes none
    assert len(outputs.hidden_states) == dense.config.num_hidden_layers + 1
    for m in (model, dense):
        m.set_attn_implementation("eager")
    got, expected = model(**inputs).attentions, dense(**inputs).attentions
    assert len(got) == len(expected) == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "router"),
    [
        (t, router)
        for t in ALL
        for router in ("linear", "query_norm", "two_stage")
        if router != "query_norm" or not BY_TYPE[t].query_norm  # which can't read normalised queries
    ],
)
def test_every_implementation_gives_the_same_outputs_and_gradients(model_type, router) -> None:
    calibration = dict(calibration=None) if router == "query_norm" else {}
    model = converted_model(model_type, router=router, **calibration, **SOME_HEADS)
    inputs = with_labels(inputs_of(model_type, 2, 20))
    runs = []
    for implementation in ("moh", "moh_reference", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs = model(**inputs)
        outputs.loss.backward()
        runs.append((outputs.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    for logits, gradients in runs[1:]:
        assert_same(logits, runs[0][0])
        assert gradients.keys() == runs[0][1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][1][name], rtol=1e-3, atol=2e-5, msg=name)
