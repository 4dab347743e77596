"""Promises of decoding by one operator: the same logits, when it is used, a cache that never changes tensors in use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import moh
import moh.attention.cpu
from moh.models.transformers import attention
from moh.routing import LinearRouter

pytestmark = pytest.mark.skipif(moh.attention.cpu.unavailable() is not None, reason="there are no CPU kernels")

SERVED = [
    pytest.param(dict(router="linear"), id="linear"),
    pytest.param(dict(router="linear", shared_heads=[[1], [0, 3]], active_heads=[2, 1]), id="linear-uneven"),
    pytest.param(dict(router="linear", shared_heads=[4, 2], active_heads=[0, 2]), id="linear-all-active"),
    pytest.param(
        dict(router="threshold", shared_heads=[[2], [0, 1]], active_heads=1, thresholds=[[1, 0, 0, -1], [1, 0, -1]]),
        id="threshold",
    ),
    pytest.param(dict(router="two_stage"), id="two_stage"),
    pytest.param(
        dict(router="linear", routing_unit="group_balanced", shared_heads=0, active_heads=2), id="linear-balanced"
    ),
    pytest.param(
        dict(router="linear", routing_unit="kv_group", shared_heads=2, active_heads=0), id="linear-shared-group"
    ),
    pytest.param(dict(router="linear", routing_unit="kv_group", shared_heads=0, active_heads=2), id="linear-kv-group"),
    pytest.param(dict(router="linear", attention_bias=True, head_dim=6, tie_word_embeddings=True), id="biases"),
    pytest.param(dict(router="linear", family="Mistral", sliding_window=None), id="mistral"),
    pytest.param(dict(router="linear", family="Qwen2"), id="qwen2"),
    pytest.param(dict(router="linear", family="Gemma", head_dim=10), id="gemma"),
    pytest.param(
        dict(
            router="linear",
            family="Gemma2",
            head_dim=8,
            query_pre_attn_scalar=24,
            layer_types=["full_attention"] * 2,
        ),
        id="gemma2",
    ),
    pytest.param(dict(router="linear", family="Granite", attention_multiplier=0.4), id="granite"),
    pytest.param(dict(router="linear", family="Starcoder2", residual_dropout=0.2), id="starcoder2"),
]


@pytest.fixture
def decoded(monkeypatch) -> list[bool]:
    """For each call of an attention layer, whether the operator handled it."""
    calls: list[bool] = []
    original = attention.decode

    def noted(*args):
        out = original(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(attention, "decode", noted)
    return calls


def prefilled(model, tokens, length=7) -> DynamicCache:
    with torch.no_grad():
        return model(tokens[:, :length], use_cache=True).past_key_values


def step(model, tokens, cache, at=7, **options):
    return model(tokens[:, at : at + 1], past_key_values=cache, **options).logits


@pytest.mark.parametrize("kind", SERVED)
@torch.no_grad()
def test_logits_are_those_of_the_full_forward_pass(tiny_model, tokens, decoded, kind):
    model = tiny_model(**kind)
    full = model(tokens).logits
    cache = prefilled(model, tokens)
    decoded.clear()
    for t in range(7, 12):
        torch.testing.assert_close(step(model, tokens, cache, t), full[:, t : t + 1], rtol=1e-4, atol=2e-5)
    assert decoded == [True] * 10
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_left_padding_is_masked(tiny_model, tokens, decoded):
    model = tiny_model(router="linear")
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    full = model(tokens, attention_mask=mask, position_ids=positions).logits
    cache = model(
        tokens[:, :11], attention_mask=mask[:, :11], position_ids=positions[:, :11], use_cache=True
    ).past_key_values
    decoded.clear()
    last = step(model, tokens, cache, 11, attention_mask=mask, position_ids=positions[:, 11:])
    torch.testing.assert_close(last, full[:, 11:], rtol=1e-4, atol=2e-5)
    assert decoded == [True, True]


@pytest.mark.parametrize("plain", [True, False], ids=["plain-cache", "own-cache"])
@torch.no_grad()
def test_a_sliding_window_is_a_mask_or_is_not_decoded_by_the_operator(tiny_model, tokens, decoded, plain):
    model = tiny_model(family="Mistral", router="linear", sliding_window=4)
    full = model(tokens).logits
    cache = model(tokens[:, :7], past_key_values=DynamicCache() if plain else None, use_cache=True).past_key_values
    decoded.clear()
    for t in range(7, 12):
        torch.testing.assert_close(step(model, tokens, cache, t), full[:, t : t + 1], rtol=1e-4, atol=2e-5)
    assert decoded == [plain] * 10


class Adapter(nn.Linear):
    pass


@pytest.mark.parametrize(
    "reason",
    [
        "gradients",
        "hook",
        "adapter",
        "replaced forward",
        "autocast",
        "other backend",
        "query_norm",
        "static cache",
        "float64",
        "two tokens",
        "large batch",
    ],
    ids=lambda r: r.replace(" ", "-"),
)
def test_all_else_takes_the_layers_own_way(tiny_model, tokens, decoded, monkeypatch, reason):
    model = tiny_model(
        router="query_norm" if reason == "query_norm" else "linear",
        attn_implementation="moh_sdpa" if reason == "other backend" else None,
    )
    if reason == "float64":
        model.double()
    if reason == "large batch":
        monkeypatch.setattr("moh.models.transformers.decoding.MAX_BATCH", 1)
    cache = prefilled(model, tokens)
    if reason == "static cache":
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(tokens[:, :7], past_key_values=cache)
    layers = [layer.self_attn for layer in model.model.layers]
    seen = []
    for layer in layers:
        if reason == "hook":
            layer.q_proj.register_forward_hook(lambda *_: seen.append(1))
        if reason == "adapter":
            layer.o_proj.__class__ = Adapter
        if reason == "replaced forward":
            layer.v_proj.forward = layer.v_proj.forward
    decoded.clear()
    with torch.set_grad_enabled(reason == "gradients"), torch.autocast("cpu", enabled=reason == "autocast"):
        if reason == "two tokens":
            model(tokens[:, 7:9], past_key_values=cache)
        else:
            step(model, tokens, cache)
    assert decoded == [False, False]
    assert len(seen) == (2 if reason == "hook" else 0)


class Fewest(LinearRouter):
    """A router of one's own: the heads with the smallest predictions."""

    def _route(self, source):
        self.contribution.weight.neg_()
        routing = super()._route(source)
        self.contribution.weight.neg_()
        return routing


@torch.no_grad()
def test_a_router_class_of_ones_own_decides_for_every_token(tiny_model, tokens, decoded):
    model = tiny_model(router="linear")
    shipped = model(tokens).logits
    for layer in model.model.layers:
        layer.self_attn.router.__class__ = Fewest
    full = model(tokens).logits
    assert not torch.allclose(full, shipped)
    cache = prefilled(model, tokens)
    decoded.clear()
    for t in range(7, 12):
        torch.testing.assert_close(step(model, tokens, cache, t), full[:, t : t + 1], rtol=1e-4, atol=2e-5)
    assert decoded == [True] * 10


@torch.no_grad()
def test_what_is_recorded_in_decoding_is_what_the_routers_return(tiny_model, tokens, decoded):
    model = tiny_model(router="linear")
    with moh.record_routing(model) as full:
        expected = model(tokens[:, :8]).logits[:, 7:]
    cache = prefilled(model, tokens)
    decoded.clear()
    with moh.record_routing(model) as routing:
        got = step(model, tokens, cache)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert decoded == [True, True]
    for (name, info), (full_name, full_info) in zip(routing, full, strict=True):
        assert name == full_name
        assert torch.equal(info.gates, full_info.gates[:, 7:])
        torch.testing.assert_close(info.probs, full_info.probs[:, 7:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_token_is_written_in_place_and_not_with_the_whole_cache(tiny_model, tokens):
    model = tiny_model(router="linear")
    cache = prefilled(model, tokens)
    step(model, tokens, cache)
    before = cache.layers[0].keys.data_ptr()
    step(model, tokens, cache, 8)
    assert cache.layers[0].keys.data_ptr() == before
    assert cache.layers[0].keys.shape[2] == 9


@pytest.mark.parametrize("change", ["crop", "reorder", "deep copy", "repeat", "reset"])
@torch.no_grad()
def test_changes_of_the_cache_go_on_as_with_transformers_own(tiny_model, tokens, monkeypatch, change):
    model = tiny_model(router="linear")

    def run() -> list[torch.Tensor]:
        cache = prefilled(model, tokens)
        outputs = [step(model, tokens, cache, 7), step(model, tokens, cache, 8)]
        snapshot = [cache.layers[1].keys, cache.layers[1].values]
        kept = [tensor.clone() for tensor in snapshot]
        ids = tokens
        if change == "crop":
            cache.crop(-2)
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 1]))
        if change == "deep copy":
            other = copy.deepcopy(cache)
            outputs.append(step(model, tokens.flip(1), other))
        if change == "repeat":
            cache.batch_repeat_interleave(2)
            ids = tokens.repeat_interleave(2, dim=0)
        if change == "reset":
            cache.reset()
        zeroed = change == "reset" and cache.layers[1].is_initialized  # transformers 5.17 resets tensors in place
        outputs += [step(model, ids.flip(1), cache), step(model, ids.flip(1), cache, 8)]
        assert zeroed or all(torch.equal(a, b) for a, b in zip(snapshot, kept, strict=True))
        return outputs

    got = run()
    monkeypatch.setattr(attention, "decode", lambda *_: None)
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_cache_of_inference_mode_can_be_gone_on_with_outside_of_it(tiny_model, tokens):
    model = tiny_model(router="linear")
    with torch.no_grad():
        full = model(tokens).logits
    with torch.inference_mode():
        cache = model(tokens[:, :7], use_cache=True).past_key_values
        step(model, tokens, cache, 7)
    with torch.no_grad():
        torch.testing.assert_close(step(model, tokens, cache, 8), full[:, 8:9], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_full_cache_is_enlarged(tiny_model, tokens, monkeypatch):
    monkeypatch.setattr("moh.models.transformers.decoding.MIN_ROOM", 2)
    model = tiny_model(router="linear")
    full = model(tokens).logits
    cache = prefilled(model, tokens)
    for t in range(7, 12):
        torch.testing.assert_close(step(model, tokens, cache, t), full[:, t : t + 1], rtol=1e-4, atol=2e-5)
