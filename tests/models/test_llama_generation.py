"""Promises of generation: the cache and padding change the speed, not the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import moh.attention.backends
import moh.attention.cpu

KINDS = [
    pytest.param(dict(router="two_stage"), id="two_stage"),
    pytest.param(dict(router="query_norm"), id="query_norm"),
    pytest.param(dict(router="linear", shared_heads=[[1], [0, 3]], active_heads=[2, 1]), id="linear-uneven"),
    pytest.param(dict(family="Mistral", sliding_window=4), id="sliding-window"),
]


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["moh", "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_token_at_a_time_with_the_cache_is_one_full_forward(tiny_model, tokens, kind, implementation):
    model = tiny_model(**kind)
    model.set_attn_implementation(implementation)
    full = model(tokens).logits
    cache, steps = None, []
    for t in range(tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunks_with_the_cache_are_one_full_forward(tiny_model, tokens, kind):
    model = tiny_model(**kind)
    full = model(tokens).logits
    cache, steps = DynamicCache(config=model.config), []
    for chunk in tokens.split([5, 3, 4], dim=1):
        steps.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_takes_the_cache_by_its_old_and_by_its_new_name(tiny_model, tokens, kind):
    """transformers 5.24 renames `past_key_values` to `cache`."""
    model = tiny_model(**kind).model
    x = model.embed_tokens(tokens)  # [B, N, C]
    outputs = []
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        for part in (slice(0, 7), slice(7, 8), slice(8, 9)):  # the prompt, then two tokens that are decoded
            angles = model.rotary_emb(x, torch.arange(12)[None, part])
            out, _ = model.layers[0].self_attn(x[:, part], position_embeddings=angles, **{name: cache})
        assert cache.get_seq_length() == 9
        outputs.append(out)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_static_cache_is_one_full_forward(tiny_model, tokens, kind):
    model = tiny_model(**kind)
    full = model(tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    steps = [model(tokens[:, :7], past_key_values=cache).logits]
    steps += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(7, 12)]
    assert_close(torch.cat(steps, dim=1), full)


def generate(model, ids: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("implementation", ["moh", "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_does_not_change_what_is_generated(tiny_model, tokens, kind, implementation):
    model = tiny_model(**kind)
    model.set_attn_implementation(implementation)
    short, long = tokens[:1, :5], tokens[1:, :9]
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    got = generate(model, padded, mask)
    assert got[0].tolist() == generate(model, short)[0].tolist()
    assert got[1].tolist() == generate(model, long)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_left_padding_does_not_change_the_logits_of_real_tokens(tiny_model, tokens, kind):
    model = tiny_model(**kind)
    expected = model(tokens).logits
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits
    assert got.isfinite().all()
    assert_close(got[:, 4:], expected)


def test_generation_is_what_repeated_full_forwards_choose(tiny_model, tokens):
    model = tiny_model()
    ids = tokens[:1, :6]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert generate(model, tokens[:1, :6]).tolist() == ids[:, 6:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_static_cache_is_the_same(tiny_model, tokens, kind):
    model = tiny_model(**kind)
    expected = generate(model, tokens[:, :6])
    got = generate(model, tokens[:, :6], cache_implementation="static", disable_compile=True)
    assert got.tolist() == expected.tolist()


def test_beam_search_reorders_the_cache(tiny_model, tokens):
    model = tiny_model()
    with_cache = generate(model, tokens[:, :6], num_beams=3)
    assert with_cache.tolist() == generate(model, tokens[:, :6], num_beams=3, use_cache=False).tolist()


@torch.no_grad()
def test_moh_is_the_fastest_backend_or_the_one_it_names(tiny_model, tokens, monkeypatch):
    chosen = []
    original = moh.attention.backends.choose_backend

    def noted(*args, **kwargs):
        backend = original(*args, **kwargs)
        chosen.append(backend.name)
        return backend

    monkeypatch.setattr(moh.attention.backends, "choose_backend", noted)
    model = tiny_model()
    with torch.enable_grad():  # without gradients the CPU has operators that nothing has to choose
        model(tokens)
    assert set(chosen) == {"cpu" if moh.attention.cpu.unavailable() is None else "sdpa"}
    for name in ("reference", "sdpa"):
        chosen.clear()
        model.set_attn_implementation(f"moh_{name}")
        model(tokens)
        assert set(chosen) == {name}
    chosen.clear()
    model.set_attn_implementation("eager")
    model(tokens)
    assert not chosen
