"""Promises of decoding a token's MLP and logits by operators: the same logits, when they are used, and nothing else changes."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moh.attention.cpu
from moh.models.transformers import decoder_layer
from moh.models.transformers.families import FAMILIES

pytestmark = pytest.mark.skipif(moh.attention.cpu.unavailable() is not None, reason="there are no CPU kernels")

HANDLED = [
    pytest.param(dict(), id="llama"),
    pytest.param(dict(mlp_bias=True, tie_word_embeddings=True), id="biases-tied"),
    pytest.param(dict(shared_heads=4, active_heads=0), id="all-heads"),
    pytest.param(dict(router="query_norm"), id="query_norm"),
    pytest.param(dict(family="Mistral", sliding_window=None), id="mistral"),
    pytest.param(dict(family="Qwen2"), id="qwen2"),
    pytest.param(dict(family="Qwen3", head_dim=8), id="qwen3"),
    pytest.param(dict(family="Gemma", head_dim=8), id="gemma"),
    pytest.param(dict(family="Phi3", resid_pdrop=0.3), id="phi3"),
    pytest.param(dict(family="Granite", residual_multiplier=0.3, logits_scaling=2.0), id="granite"),
    pytest.param(dict(family="Starcoder2", residual_dropout=0.2), id="starcoder2"),
    pytest.param(dict(family="Gemma2", head_dim=8), id="gemma2"),
    pytest.param(dict(family="Gemma3Text", head_dim=8), id="gemma3"),
    pytest.param(dict(family="Olmo2"), id="olmo2"),
    pytest.param(dict(family="Cohere", logit_scale=0.5), id="cohere"),
    pytest.param(dict(family="Cohere2", head_dim=8), id="cohere2"),
    pytest.param(dict(family="Phi", resid_pdrop=0.3), id="phi"),
    pytest.param(dict(family="GPTNeoX"), id="gpt_neox"),
    pytest.param(dict(family="GPTNeoX", use_parallel_residual=False), id="gpt_neox-sequential"),
]


@pytest.fixture
def used(monkeypatch) -> list[bool]:
    """For each call of a layer, whether the operator computed its MLP."""
    calls: list[bool] = []
    original = decoder_layer.DecodedLayer._parts

    def noted(*args):
        parts = original(*args)
        calls.append(parts is not None)
        return parts

    monkeypatch.setattr(decoder_layer.DecodedLayer, "_parts", noted)
    return calls


def prefilled(model, tokens):
    with torch.no_grad():
        return model(tokens[:, :7], use_cache=True).past_key_values


def step(model, tokens, cache, at=7):
    return model(tokens[:, at : at + 1], past_key_values=cache).logits


@pytest.mark.parametrize("kind", HANDLED)
@torch.no_grad()
def test_logits_are_those_of_the_full_forward_pass(tiny_model, tokens, used, kind):
    model = tiny_model(**kind)
    full = model(tokens).logits
    cache = prefilled(model, tokens)
    used.clear()
    for t in range(7, 12):
        torch.testing.assert_close(step(model, tokens, cache, t), full[:, t : t + 1], rtol=1e-4, atol=2e-5)
    assert used == [True] * 10


class Operators(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["Llama", "OPT"])
@torch.no_grad()
def test_logits_of_every_family_are_one_operator(tiny_model, tokens, family):
    options = dict(ffn_dim=48, word_embed_proj_dim=32) if family == "OPT" else {}
    model = tiny_model(family=family, **options)
    full = model(tokens).logits
    cache = prefilled(model, tokens)
    with Operators() as operators:
        logits = step(model, tokens, cache)
    torch.testing.assert_close(logits, full[:, 7:8], rtol=1e-4, atol=2e-5)
    assert operators.names.count("moh::cpu_decode_linear") == 1
    assert operators.names.count("moh::cpu_decode_mlp") == (2 if family == "Llama" else 0)


class Adapter(nn.Linear):
    pass


CHANGES = {
    "hook of the MLP": lambda layer, seen: layer.mlp.register_forward_hook(lambda *_: seen.append(1)),
    "hook of a projection": lambda layer, seen: layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1)),
    "hook of a norm": lambda layer, seen: layer.input_layernorm.register_forward_pre_hook(lambda *_: seen.append(1)),
    "adapter": lambda layer, seen: setattr(layer.mlp.down_proj, "__class__", Adapter),
    "other activation": lambda layer, seen: setattr(layer.mlp, "act_fn", nn.ReLU()),
    "replaced forward": lambda layer, seen: setattr(layer.mlp, "forward", layer.mlp.forward),
    "replaced MLP": lambda layer, seen: setattr(layer, "mlp", nn.Sequential(layer.mlp)),
    "weight of a norm": lambda layer, seen: layer.input_layernorm.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_layer_that_was_changed_takes_its_own_way(tiny_model, tokens, used, change):
    model, seen = tiny_model(), []
    cache = prefilled(model, tokens)
    for layer in model.model.layers:
        CHANGES[change](layer, seen)
    used.clear()
    if change == "weight of a norm":
        with pytest.raises(RuntimeError):  # transformers' own, as PyTorch refuses two dtypes
            step(model, tokens, cache)
        assert used == [False]
        return
    step(model, tokens, cache)
    assert used == [False, False]
    assert len(seen) == (2 if "hook" in change else 0)


@pytest.mark.parametrize("reason", ["gradients", "training", "autocast", "reference", "sdpa", "two tokens"])
def test_all_else_takes_the_layers_own_way(tiny_model, tokens, used, reason):
    model = tiny_model()
    if reason in ("reference", "sdpa"):
        model.set_attn_implementation("moh_reference" if reason == "reference" else "sdpa")
    cache = prefilled(model, tokens)
    model.train(reason == "training")
    used.clear()
    with torch.set_grad_enabled(reason == "gradients"), torch.autocast("cpu", enabled=reason == "autocast"):
        if reason == "two tokens":
            model(tokens[:, 7:9], past_key_values=cache)
        else:
            step(model, tokens, cache)
    assert used == [False, False]


@torch.no_grad()
def test_a_hook_of_the_output_layer_still_runs(tiny_model, tokens):
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    step(model, tokens, prefilled(model, tokens))
    assert len(seen) == 2


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_familys_own_way(tiny_model, tokens, monkeypatch):
    exact = tiny_model(shared_heads=4, active_heads=0)
    full = exact(tokens).logits[:, 7:8]
    model = exact.bfloat16()
    ours = step(model, tokens, prefilled(model, tokens)).float()
    monkeypatch.setattr(decoder_layer, "is_decoded", lambda *_: False)
    own = step(model, tokens, prefilled(model, tokens)).float()
    assert (ours - full).square().mean() <= 1.5 * (own - full).square().mean()


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.layer], ids=lambda family: family.model_type
)
def test_layers_keep_the_name_by_which_others_find_them_and_can_be_pickled(tiny_model, family):
    model = tiny_model(family=family.config.removesuffix("Config"))
    for layer in model.base_model.layers:
        assert type(layer).__name__ == family.layer
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    assert set(model._no_split_modules) == {family.layer}
