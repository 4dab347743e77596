"""Promises of what a layer remembers for new tokens: it is read once, and again as soon as something has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import moh
import moh.attention.cpu
from moh.models.transformers import decoder_layer, decoding

pytestmark = pytest.mark.skipif(moh.attention.cpu.unavailable() is not None, reason="there are no CPU kernels")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of what was read."""
    names: list[str] = []
    for module, name in ((decoding, "_fixed"), (decoder_layer, "_parts")):
        original = getattr(module, name)

        def noted(*args, original=original, name=name):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, noted)
    return names


def replaced(model) -> None:
    old = model.model.layers[0].self_attn.q_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    model.model.layers[0].self_attn.q_proj = new


def new_weight(model) -> None:
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(torch.randn_like(up.weight))


def other_eps(model) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def other_scale(model) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


def patched(model) -> None:
    down = model.model.layers[0].mlp.down_proj
    down.forward = lambda x: 2 * nn.functional.linear(x, down.weight)


def hooked(model) -> None:
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = {
    "module": replaced,
    "weight": new_weight,
    "eps-of-a-norm": other_eps,
    "scale": other_scale,
    "patched-forward": patched,
    "hook": hooked,
    "dial": lambda model: moh.set_active_heads(model, 1),
    "dtype": lambda model: model.to(torch.bfloat16),
    "weights-in-place": lambda model: model.model.layers[0].self_attn.o_proj.weight.data.mul_(2),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_token(tiny_model, tokens, reads, change):
    model = tiny_model()
    for t in (3, 4, 5):
        model(tokens[:, t : t + 1], past_key_values=model(tokens[:, :3], use_cache=True).past_key_values)
    assert sorted(reads) == ["_fixed"] * 2 + ["_parts"] * 2  # once for each of two layers
    CHANGES[change](model)
    got = model(tokens[:, 3:4], past_key_values=model(tokens[:, :3], use_cache=True).past_key_values).logits
    with torch.enable_grad():  # the family's own way
        expected = model(tokens[:, :4]).logits[:, 3:].detach()
    close = dict(rtol=1e-4, atol=2e-5) if model.dtype == torch.float32 else dict(rtol=0, atol=0.1)
    torch.testing.assert_close(got, expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("part", ["", "self_attn", "self_attn.router", "self_attn.router.contribution"])
def test_a_hook_that_changes_nothing_read_costs_no_reading_per_token(tiny_model, tokens, reads, part):
    model, seen = tiny_model(router="linear"), []
    for layer in model.model.layers:
        layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    cache = model(tokens[:, :3], use_cache=True).past_key_values
    seen.clear()
    for t in (3, 4, 5):
        model(tokens[:, t : t + 1], past_key_values=cache)
    assert len(seen) == 3 * 2
    assert sorted(reads) == ["_fixed"] * 2 + ["_parts"] * 2


@torch.no_grad()
@pytest.mark.parametrize("part", ["self_attn.router", "self_attn.o_proj"])
def test_a_hook_that_is_removed_is_read_again(tiny_model, tokens, reads, part):
    model, seen = tiny_model(router="linear"), []
    hooks = [layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(1)) for layer in model.model.layers]
    cache = model(tokens[:, :3], use_cache=True).past_key_values
    model(tokens[:, 3:4], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    seen.clear()
    reads.clear()
    for t in (4, 5):
        model(tokens[:, t : t + 1], past_key_values=cache)
    assert reads.count("_fixed") == 2 and not seen


@torch.no_grad()
def test_a_shallow_copy_of_a_layer_and_its_owner_read_their_own(tiny_model, tokens, reads):
    model = tiny_model()
    step = lambda: model(tokens[:, 3:4], past_key_values=model(tokens[:, :3], use_cache=True).past_key_values).logits  # noqa: E731
    before = step()
    layer = model.model.layers[0]
    own, other = layer.self_attn, copy.copy(layer.self_attn)
    other.scaling = 3.0
    layer.self_attn = other
    after = step()
    with torch.enable_grad():
        expected = model(tokens[:, :4]).logits[:, 3:].detach()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=2e-5)
    assert not torch.equal(after, before)
    layer.self_attn = own
    reads.clear()
    torch.testing.assert_close(step(), before, rtol=0, atol=0)
    assert "_fixed" not in reads


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_reads_its_own_weights(tiny_model, tokens, copied):
    model = tiny_model()
    step = lambda m: m(tokens[:, 3:4], past_key_values=m(tokens[:, :3], use_cache=True).past_key_values).logits  # noqa: E731
    step(model)
    other = copied(model)
    expected = step(other)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(step(other), expected, rtol=0, atol=0)
    assert step(model).abs().max() == 0


@torch.no_grad()
def test_halves_of_a_weight_are_those_of_its_new_memory(tiny_model, tokens):
    model = tiny_model(family="Phi3", pad_token_id=0)
    step = lambda: model(tokens[:, 3:4], past_key_values=model(tokens[:, :3], use_cache=True).past_key_values).logits  # noqa: E731
    step()
    for layer in model.model.layers:
        layer.mlp.gate_up_proj.weight.data = torch.randn_like(layer.mlp.gate_up_proj.weight)
    with torch.enable_grad():
        expected = model(tokens[:, :4]).logits[:, 3:].detach()
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_weight_may_be_a_buffer_that_is_replaced(tiny_model, tokens):
    model = tiny_model()
    step = lambda: model(tokens[:, 3:4], past_key_values=model(tokens[:, :3], use_cache=True).past_key_values).logits  # noqa: E731
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        del layer.self_attn.o_proj.weight
        layer.self_attn.o_proj.register_buffer("weight", weight.detach())
    before = step()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight = 2 * layer.self_attn.o_proj.weight
    after = step()
    assert not torch.equal(after, before)
    with torch.enable_grad():
        expected = model(tokens[:, :4]).logits[:, 3:].detach()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=2e-5)
