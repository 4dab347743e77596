"""Promise: equal to the published implementation on a tiny random model (`tests/golden/llama_a.safetensors`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden" / "llama_a.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(params=["moh", "moh_reference", "sdpa", "eager"])
def model(request, golden) -> MoHLlamaForCausalLM:
    with safe_open(GOLDEN, "pt") as file:
        published = json.loads(file.metadata()["config"])
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    same += "max_position_embeddings rms_norm_eps tie_word_embeddings router shared_heads".split()
    config = MoHLlamaConfig(
        **{name: published[name] for name in same},
        active_heads=published["routed_active"],
        rope_parameters={"rope_type": "default", "rope_theta": published["rope_theta"]},
    )
    model = MoHLlamaForCausalLM(config).eval()
    prefix = "state."
    model.load_state_dict({name.removeprefix(prefix): t for name, t in golden.items() if name.startswith(prefix)})
    model.set_attn_implementation(request.param)
    return model


def assert_parity(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_logits(model, golden):
    assert_parity(model(golden["input_ids"]).logits, golden["logits"])


@torch.no_grad()
def test_left_padded_logits_at_real_tokens(model, golden):
    mask = golden["attention_mask"]
    assert (mask[:, 0] == 0).any()
    options = dict(attention_mask=mask, position_ids=golden["position_ids"])
    got = model(golden["input_ids"], **options).logits
    assert_parity(got[mask.bool()], golden["logits_left_padded"][mask.bool()])


def test_24_greedy_tokens(model, golden):
    expected = golden["greedy"]
    prompt = expected[:, :-24]
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    assert got.tolist() == expected.tolist()
