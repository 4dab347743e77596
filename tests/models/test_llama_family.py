"""Promises of the family: with all heads active these are transformers' Llama, Mistral and Qwen2, number by number."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
)

FAMILY = [
    pytest.param(LlamaForCausalLM, LlamaConfig(**SIZES), {}, id="llama"),
    pytest.param(
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True),
        dict(attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True),
        id="llama-biases-own-head-width-tied",
    ),
    pytest.param(
        MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5), dict(sliding_window=5), id="mistral-window-5"
    ),
    pytest.param(
        MistralForCausalLM,
        MistralConfig(**SIZES, sliding_window=None),
        dict(sliding_window=None),
        id="mistral-no-window",
    ),
    pytest.param(
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES),
        dict(attention_bias=True, attention_out_bias=False),
        id="qwen2-biases-on-q-k-v",
    ),
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("original_class, config, options", FAMILY)
def test_all_heads_active_is_the_original(tiny_model, stirred, tokens, original_class, config, options, implementation):
    original = stirred(original_class(config))
    rope = {"rope_parameters": config.rope_parameters}
    heads = dict(router="query_norm", shared_heads=4, active_heads=0)
    model = tiny_model(**SIZES | rope | heads | options, attn_implementation=implementation)
    original.set_attn_implementation(implementation)
    assert model.state_dict().keys() == original.state_dict().keys()
    model.load_state_dict(original.state_dict())

    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for kind in ({}, dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))):
        got, expected = (m(tokens, labels=tokens, **kind) for m in (model, original))
        real = mask.bool() if kind else torch.ones_like(mask).bool()
        torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)

    got.logits[real].square().mean().backward()
    expected.logits[real].square().mean().backward()
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).grad,
            parameter.grad,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )

    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(tokens, **options).tolist() == original.generate(tokens, **options).tolist()


def test_fewer_heads_are_not_the_original(tiny_model, tokens):
    full = tiny_model(router="query_norm", shared_heads=4, active_heads=0)
    fewer = tiny_model(router="query_norm", shared_heads=1, active_heads=2)
    fewer.load_state_dict(full.state_dict())
    assert not torch.allclose(full(tokens).logits, fewer(tokens).logits, atol=1e-2)
