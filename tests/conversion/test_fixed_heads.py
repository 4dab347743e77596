"""Promises of fixed heads: a model without the others computes what the dense one does without them, and saves them."""

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
from transformers import DynamicCache

from moh import convert, record_routing

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import (
    BY_TYPE,
    IMAGES,
    TRAINED_HEAD,
    dense_model,
    images,
    inputs_of,
    left_padded,
    token_ids,
    with_labels,
)

from moh.models.transformers import families
from moh.models.transformers.family import at

KEPT = [pytest.param(kept, id="-".join(map(str, kept))) for kept in ([3, 0], [0, 2], [4, 1])]
ALL = [name for name, family in BY_TYPE.items() if not family.joint_norms]
DECODERS = [name for name in ALL if not BY_TYPE[name].encoder]
GENERATE = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)


def fixed(dense: Any, kept: Any, **options: Any) -> Any:
    calibration = images() if dense.config.model_type in IMAGES else token_ids()
    options = dict(router="fixed", calibration=calibration, progress=False) | options
    return convert(dense, active_heads=kept, **options)


def attentions(model: Any, model_type: str) -> list[Any]:
    return families.attentions(BY_TYPE[model_type], model.base_model)


def real_tokens(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output[inputs["attention_mask"].bool()] if output.dim() == 3 and "attention_mask" in inputs else output


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def without_other_heads(dense: Any, model_type: str, kept: list[list[int]], inputs: dict[str, Any]) -> torch.Tensor:
    """The dense model's logits with all but some heads set to 0 in front of W_O."""
    handles = []
    for attention, heads in zip(attentions(dense, model_type), kept, strict=True):
        mask = torch.zeros(4, 1)
        mask[heads] = 1

        def hide(module: Any, args: Any, mask: torch.Tensor = mask) -> Any:
            return ((args[0].unflatten(-1, (4, -1)) * mask).flatten(-2),)

        handles.append(at(attention, BY_TYPE[model_type].output).register_forward_pre_hook(hide))
    try:
        return dense(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_a_cut_model_is_the_dense_one_without_the_other_heads(model_type, kept) -> None:
    dense = dense_model(model_type)
    model = fixed(dense, kept, refit_output=False)
    heads = [list(layer.shared_indices) for layer in model.config.layer_configs()]
    assert [len(h) for h in heads] == kept and model.config.share == sum(kept) / 8
    inputs = inputs_of(model_type, padded=True)
    expected = real_tokens(without_other_heads(dense, model_type, heads, inputs), inputs)
    for implementation in ("moh", "moh_reference", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert_same(real_tokens(model(**inputs).logits, inputs), expected)


@pytest.mark.parametrize("model_type", ALL)
def test_every_implementation_gives_the_same_gradients(model_type) -> None:
    model = fixed(dense_model(model_type), [3, 0])
    inputs = with_labels(inputs_of(model_type, 2, 20))
    runs = []
    for implementation in ("moh", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model(**inputs).loss.backward()
        runs.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for gradients in runs[1:]:
        assert gradients.keys() == runs[0].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("model_type", ALL)
def test_weights_of_other_heads_are_gone(model_type, kept) -> None:
    dense = dense_model(model_type)
    model = fixed(dense, kept, refit_output=False)
    family, kv_heads = BY_TYPE[model_type], getattr(dense.config, "num_key_value_heads", 4)
    layers = zip(
        attentions(model, model_type), attentions(dense, model_type), model.config.layer_configs(), strict=True
    )
    for attention, original, layer in layers:
        heads = list(layer.shared_indices)
        groups = sorted({head * kv_heads // 4 for head in heads})
        if family.fused:
            inputs, expected, dense_counts = [family.fused], [len(heads) + 2 * len(groups)], [4 + 2 * kv_heads]
        else:
            inputs = [family.queries, family.keys, family.values]
            expected, dense_counts = [len(heads), len(groups), len(groups)], [4, kv_heads, kv_heads]
        for path, count, before in zip(inputs, expected, dense_counts, strict=True):
            whole, part = at(at(original, family.core), path), at(at(attention, family.core), path)
            assert (part is None) is not heads
            if heads:
                assert part.weight.numel() * before == whole.weight.numel() * count
        assert sum(p.numel() for p in attention.parameters()) < sum(p.numel() for p in original.parameters()) or all(
            kept
        )
    ours, theirs = ({t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (model, dense))
    assert not ours & theirs
    saved = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved > 0 and not any(".router." in name for name in model.state_dict())


@pytest.mark.parametrize("refit", [True, False], ids=["linear", "nothing"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_caches_change_nothing_in_greedy_text_and_beams(model_type, kept, refit) -> None:
    model = fixed(dense_model(model_type), kept, refit_output=refit)
    inputs = left_padded(token_ids(2, 12)) | GENERATE
    expected = model.generate(**inputs, use_cache=False).tolist()
    assert model.generate(**inputs).tolist() == expected
    assert model.generate(**inputs, cache_implementation="static", disable_compile=True).tolist() == expected
    beams = dict(num_beams=3) | inputs
    assert model.generate(**beams).tolist() == model.generate(**beams, use_cache=False).tolist()
    one = token_ids(1, 12)
    guessed = model.generate(one, prompt_lookup_num_tokens=3, **GENERATE)  # crops the cache
    assert guessed.tolist() == model.generate(one, **GENERATE).tolist()
    model.set_attn_implementation("sdpa")
    assert model.generate(**inputs).tolist() == expected


@pytest.mark.parametrize("kept", [[0, 3], [3, 0], [1, 4]])
@torch.no_grad()
def test_the_cache_holds_the_key_value_heads_that_are_read_and_nothing_of_layers_without_heads(kept) -> None:
    model = fixed(dense_model("llama"), kept)
    cache = DynamicCache(config=model.config)
    model(token_ids(2, 12), past_key_values=cache)
    assert cache.get_seq_length() == 12
    for layer, config in zip(cache.layers, model.config.layer_configs(), strict=True):
        groups = {head // 2 for head in config.shared_indices}
        size = 0 if layer.keys is None else layer.keys.numel()
        assert size == 2 * 12 * len(groups) * 6 or (not groups and size <= 2 * 12)


@pytest.mark.parametrize("refit", [True, False], ids=["linear", "nothing"])
@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_the_auto_class_loads_what_was_saved(model_type, refit, tmp_path: Path) -> None:
    model = fixed(dense_model(model_type), [3, 0], refit_output=refit)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["router"], saved["active_heads"]) == ("fixed", 0)
    assert [len(heads) for heads in saved["shared_heads"]] == [3, 0]
    auto = getattr(transformers, TRAINED_HEAD[model_type])
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = inputs_of(model_type, padded=True)
    expected = model(**inputs).logits
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(**inputs).logits, expected)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_the_refit_and_the_linear_map_come_nearer_to_the_dense_model(model_type) -> None:
    dense = dense_model(model_type)
    inputs = inputs_of(model_type, 16, 16)
    expected = dense(**inputs).logits
    for kept in ([2, 2], [0, 4]):
        near, far = (fixed(dense, kept, refit_output=refit)(**inputs).logits for refit in (True, False))
        assert (near - expected).square().mean() < (far - expected).square().mean()


@pytest.mark.parametrize(("unit", "kept"), [("group_balanced", 2), ("kv_group", 2)])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@torch.no_grad()
def test_heads_are_fixed_in_the_units_of_the_groups(model_type, unit, kept) -> None:
    dense = dense_model(model_type)
    model = fixed(dense, kept, routing_unit=unit, allocation="even")
    for attention, layer in zip(attentions(model, model_type), model.config.layer_configs(), strict=True):
        groups = [head // 2 for head in layer.shared_indices]
        assert sorted(groups) == [0, 1] if unit == "group_balanced" else len(set(groups)) == 1
        assert attention.heads_of_group == ((1, 1) if unit == "group_balanced" else (2,))
    inputs = inputs_of(model_type)
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert_same(model(**inputs).logits, expected)


@pytest.mark.parametrize(("unit", "heads", "kv_heads"), [("group_balanced", 2, 2), ("kv_group", 2, 1)])
@torch.no_grad()
def test_with_the_same_numbers_in_every_layer_the_tensors_are_a_plain_models(unit, heads, kv_heads) -> None:
    model = fixed(dense_model("llama"), 2, routing_unit=unit, allocation="even")
    plain = transformers.LlamaConfig.from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "router")}
        | dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    )
    engine = transformers.LlamaForCausalLM(plain).eval()
    engine.load_state_dict(model.state_dict())
    ids = token_ids(2, 12)
    assert_same(model(ids).logits, engine(ids).logits)


@torch.no_grad()
def test_the_dial_is_refused_and_a_recording_shows_what_is_used() -> None:
    model = fixed(dense_model("llama"), [3, 0])
    with pytest.raises(ValueError, match="the heads of every layer are fixed"):
        model.set_active_heads(1)
    with record_routing(model) as routing:
        model(token_ids(2, 12))
    assert len(routing) == 2 and routing.share() == 3 / 8 and float(routing.balance_loss()) == 0
    assert [int(info.active[0, 0].sum()) for _, info in routing] == [3, 0]


def test_a_lora_reaches_the_layers_that_have_heads() -> None:
    peft = pytest.importorskip("peft")
    model = fixed(dense_model("llama"), [3, 0])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert len([name for name, _ in adapted.named_parameters() if "lora_A" in name]) == 4 + 1
    adapted(**with_labels(inputs_of("llama"))).loss.backward()


def test_what_needs_equal_layers_is_refused() -> None:
    from moh.models.transformers.tensor_parallel import interleave_shared_heads

    model = fixed(dense_model("llama"), [3, 4])
    with pytest.raises(
        ValueError, match=r"splitting the heads over processes needs the same heads .* in 2 of 2 layers"
    ):
        interleave_shared_heads(model, 2)
    with pytest.raises(ValueError, match="continuous batching needs the same heads"):
        model.init_continuous_batching()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shared_heads=1), "shared_heads must be left out for router='fixed'"),
        (dict(active_heads=5), "active_heads must be between 0 and 4 in each layer for router='fixed'.*got 5"),
        (dict(active_heads=0), "not 0 in all, got 0"),
        (dict(shares=[0.5]), "shares needs layers that all route"),
        (dict(calibration=None), "calibration must be given for router='fixed'"),
        (dict(layers="some"), "layers must be one of 'keep', 'drop', 'mix', got 'some'"),
        (dict(layers="drop", allocation="even"), "allocation must be 'sensitivity' for layers='drop'"),
        (dict(layers="drop", router="two_stage"), "router must be None or 'fixed' for layers='drop'"),
        (dict(layers="mix", router="two_stage"), "router must be 'linear' or 'threshold' or 'fixed' for layers='mix'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        convert(dense_model("llama"), **dict(router="fixed", active_heads=2, calibration=token_ids()) | options)


@pytest.mark.parametrize("options", [dict(), dict(layers="mix", router="linear", shared_heads=1)], ids=["fixed", "mix"])
def test_norms_over_all_heads_together_are_refused(options) -> None:
    with pytest.raises(ValueError, match="heads can't be cut out of a model of type 'olmo2'"):
        fixed(dense_model("olmo2"), 2, **options)


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_layers_without_heads_need_a_model_that_generates(model_type) -> None:
    with pytest.raises(ValueError, match="layers must be 'keep' for this model, got 'drop'"):
        fixed(dense_model(model_type), 2, layers="drop")


@pytest.mark.parametrize(
    "model_type", [name for name in DECODERS if name != "lfm3"]
)  # it needs a cache of its own kind
@torch.no_grad()
def test_a_cache_that_is_empty_is_filled(model_type) -> None:
    model = fixed(dense_model(model_type), [1, 4])
    ids, cache = token_ids(1, 12), DynamicCache()
    model(ids[:, :-1], past_key_values=cache)
    assert cache.get_seq_length() == 11
    got = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)
