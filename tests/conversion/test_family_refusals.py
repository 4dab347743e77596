"""Promises of refusals: they come before anything changes, with the reason and what works instead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the llm extra is not installed")

import transformers

from moh import convert

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import BY_TYPE, TINY, dense_model, token_ids

HEADS = dict(shared_heads=1, active_heads=1)


def neighbour(kind: str, **options: Any) -> Any:
    """A model of a type that can't be converted."""
    config = getattr(transformers, f"{kind}Config")(**TINY | options)
    return getattr(transformers, f"{kind}Model")(config)


def with_foreign_attention() -> Any:
    model = dense_model("qwen3")
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("OtherAttention", (type(attention),), {})
    return model


def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    model = dense_model("gpt2")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), model)
    return model


def llama_with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["o_proj"]), model)
    return model


def wrapped_by_peft() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(dense_model("qwen3"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def quantised() -> Any:
    model = dense_model("qwen3")
    model.is_quantized = True
    return model


CASES = {
    "gemma2-capped-scores": (
        lambda: dense_model("gemma2", attn_logit_softcapping=50.0),
        {},
        "attn_logit_softcapping must be None, got 50.0: .*config.attn_logit_softcapping = None gives a model that can",
    ),
    "gpt2-cross-attention": (
        lambda: dense_model("gpt2", add_cross_attention=True),
        {},
        "add_cross_attention must be False: .*another model's tokens",
    ),
    "bert-decoder": (lambda: dense_model("bert", is_decoder=True), {}, "is_decoder must be False: .*'bert' only encoders"),
    "roberta-decoder": (lambda: dense_model("roberta", is_decoder=True), {}, "is_decoder must be False: .*'roberta' only"),
    "gpt2-two-heads": (
        lambda: transformers.GPT2DoubleHeadsModel(dense_model("gpt2").config),
        {},
        "model must be one of GPT2Model, GPT2LMHeadModel, .*got GPT2DoubleHeadsModel; its GPT2Model, model.base_model, can",
    ),
    "qwen3-query-norms": (
        lambda: dense_model("qwen3"),
        dict(router="query_norm"),
        "query_norm.*'qwen3'.*normalises its queries.*router='linear'",
    ),
    "gemma3-query-norms": (
        lambda: dense_model("gemma3_text"),
        dict(router="query_norm"),
        "query_norm.*'gemma3_text'.*normalises its queries.*router='linear'",
    ),
    "phi-query-norms": (
        lambda: dense_model("phi", qk_layernorm=True),
        dict(router="query_norm"),
        "query_norm.*'phi'.*normalises its queries.*router='linear'",
    ),
    "distilbert": (
        lambda: neighbour("DistilBert", dim=32, n_heads=4, n_layers=2, hidden_dim=48),
        {},
        "got 'distilbert'; encoders of type bert, roberta and modernbert can be converted",
    ),
    "qwen3-experts": (
        lambda: neighbour("Qwen3Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
        {},
        "got 'qwen3_moe'; the type without experts, qwen3, can be converted",
    ),
    "olmo2-query-norms": (lambda: dense_model("olmo2"), dict(router="query_norm"), "query_norm.*'olmo2'.*router='linear'"),
    "foreign-attention": (with_foreign_attention, {}, "layer 1's attention must be .*Qwen3Attention, got a Other"),
    "adapter-inside": (with_adapter, {}, r"transformer.h.0.attn.c_attn must be a plain linear layer.*merge an adapter"),
    "llama-adapter-inside": (llama_with_adapter, {}, r"layers.0.self_attn.o_proj must be a plain linear layer"),
    "wrapped-by-peft": (wrapped_by_peft, {}, r"got PeftModel.*with peft pass model.merge_and_unload\(\)"),
    "quantised": (quantised, {}, "model is quantised.*load it without quantization_config"),
    "balance-loss-below-0": (lambda: dense_model("opt"), dict(router_aux_loss_coef=-1.0), "at least 0, got -1.0"),
    "longer-than-positions": (
        lambda: dense_model("bert"),
        dict(calibration=token_ids(2, 65)),
        "must be at most the model's 64 positions, got 65",
    ),
    "positions-after-the-padding-token": (
        lambda: dense_model("roberta"),  # with 66 positions, and padding token 0
        dict(calibration=token_ids(2, 66)),
        "must be at most the model's 65 positions, got 66",
    ),
    "groups-without-groups": (lambda: dense_model("gpt2"), dict(routing_unit="kv_group"), "routing_unit must be 'head'"),
    "too-many-heads": (lambda: dense_model("opt"), dict(active_heads=4), "active_heads must be between 0 and .* = 3, got 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_converted_is_refused_with_advice_before_anything_changes(case) -> None:
    make, options, message = CASES[case]
    model: nn.Module = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    settings = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        convert(model, **dict(calibration=token_ids(4), progress=False) | HEADS | options)
    assert model.training and model.config.to_dict() == settings
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.skipif("dinov2" not in BY_TYPE, reason="this version of transformers is the old one")
def test_a_version_of_transformers_with_other_modules_is_refused(monkeypatch) -> None:
    dense = dense_model("dinov2")
    model = convert(dense, router="query_norm", **HEADS)
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    for make in (lambda: convert(dense, router="query_norm", **HEADS), lambda: type(model)(model.config)):
        with pytest.raises(ValueError, match=r"'dinov2' need transformers 5\.18 or newer, and 5\.17\.0 is installed"):
            make()


def test_a_moh_model_of_a_family_is_not_converted_again() -> None:
    model = convert(dense_model("gpt2"), router="query_norm", **HEADS)
    with pytest.raises(ValueError, match="model is a MoH model already"):
        convert(model, router="query_norm", **HEADS)


def test_a_configuration_that_the_attention_cannot_serve_is_refused() -> None:
    from moh.models.transformers import MoHBertConfig, MoHGemma2Config, MoHGPT2Config

    assert MoHGemma2Config().attn_logit_softcapping is None
    with pytest.raises(ValueError, match="attn_logit_softcapping must be None, got 30"):
        MoHGemma2Config(attn_logit_softcapping=30.0)
    with pytest.raises(ValueError, match="is_decoder must be False"):
        MoHBertConfig(is_decoder=True)
    with pytest.raises(ValueError, match="layer 0: active_heads must be between 0 and"):
        MoHGPT2Config(shared_heads=1, active_heads=12)


def test_texts_for_an_encoder_stand_between_its_special_tokens(base_dir: Path) -> None:
    from moh.conversion.transformers import DenseTextModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    tokenizer.cls_token, tokenizer.sep_token = tokenizer.convert_ids_to_tokens([5, 6])
    dense = DenseTextModel(dense_model("bert", vocab_size=len(tokenizer)), "linear", copied=True)
    groups = dense.samples(["a text of words " * 80], max_tokens=10_000, tokenizer=tokenizer, seq_len=[16, 32])
    for samples, length in zip(groups, (16, 32), strict=True):
        assert samples.shape[1] == length and len(samples) > 2
        assert set(samples[:, 0].tolist()) == {5} and set(samples[:, -1].tolist()) == {6}
    ids = token_ids(4, 12) % 23
    (found,) = dense.samples(ids, max_tokens=10_000, tokenizer=tokenizer, seq_len=None)
    assert torch.equal(found, ids)
