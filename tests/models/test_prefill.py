"""Promises of models without gradients: two operators for a layer's attention, with the numbers of its steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moh
import moh.attention.cpu

pytestmark = pytest.mark.skipif(moh.attention.cpu.unavailable() is not None, reason="there are no CPU kernels")

KINDS = [
    pytest.param(dict(), id="llama"),
    pytest.param(dict(shared_heads=4, active_heads=0), id="all-heads"),
    pytest.param(dict(router="two_stage"), id="two_stage"),
    pytest.param(dict(family="Qwen2"), id="biases"),
    pytest.param(dict(family="Qwen3", head_dim=8), id="norms-of-heads"),
    pytest.param(dict(family="Olmo2"), id="norms-of-all-heads-together"),
    pytest.param(dict(family="Gemma2", head_dim=8), id="gemma2"),
    pytest.param(dict(family="Phi"), id="rotated-in-part"),
    pytest.param(dict(family="Cohere"), id="rotated-by-neighbours"),
]
BOTH = {"moh::cpu_project", "moh::cpu_attend"}


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 64, (2, 70), generator=torch.Generator().manual_seed(3))


def operators(run) -> set[str]:
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        run()
    return {event.name for event in profile.function_events if event.name.startswith("moh::")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_are_those_of_the_steps(tiny_model, text, kind, padded):
    model = tiny_model(**kind)
    mask = torch.ones_like(text)
    mask[0, : 9 if padded else 0] = 0
    expected = model(text, attention_mask=mask).logits.detach()  # gradients are recorded
    assert operators(lambda: model(text, attention_mask=mask)) >= {"moh::cpu_route", *BOTH}
    with torch.no_grad():
        got = model(text, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=2e-5)


def test_norms_of_all_heads_together_see_every_query(tiny_model, text, monkeypatch):
    """Also where PyTorch's own product is so slow that active pairs alone always pay."""
    monkeypatch.setattr(moh.attention.projections, "_max_share", lambda *_, **__: 1.0)
    model = tiny_model(family="Olmo2")
    expected = model(text).logits.detach()
    torch.use_deterministic_algorithms(True)  # what was never written is NaN
    try:
        with torch.no_grad():
            got = model(text).logits
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_come_in_parts(tiny_model, text, kind):
    model = tiny_model(**kind)
    expected = model(text).logits.detach()
    with torch.no_grad():
        first = model(text[:, :5], use_cache=True)
        second = model(text[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "prepare, used",
    [
        pytest.param(lambda model: None, BOTH, id="plain"),
        pytest.param(lambda model: attention(model).q_proj.register_forward_hook(lambda *_: None), set(), id="hook"),
        pytest.param(lambda model: nn.utils.parametrizations.weight_norm(attention(model).k_proj), set(), id="adapter"),
        pytest.param(
            lambda model: attention(model).o_proj.register_forward_hook(lambda *_: None),
            {"moh::cpu_project"},
            id="hook-of-W_O",
        ),
        pytest.param(lambda model: model.set_attn_implementation("moh_sdpa"), set(), id="another-backend"),
        pytest.param(lambda model: attention(model).train(), BOTH, id="training-without-dropout"),
        pytest.param(lambda model: dropout(model), set(), id="training-with-dropout"),
    ],
)
def test_steps_run_one_by_one_where_something_needs_them(tiny_model, text, prepare, used):
    model = tiny_model(num_hidden_layers=1)
    expected = model(text).logits.detach()
    prepare(model)
    assert operators(lambda: model(text)) & BOTH == used
    if not (attention(model).training and attention(model).dropout_rate):
        with torch.no_grad():
            torch.testing.assert_close(model(text).logits, expected, rtol=1e-4, atol=2e-5)


def attention(model):
    return model.model.layers[0].self_attn


def dropout(model) -> None:
    attention(model).attention_dropout = 0.5
    attention(model).train()


def test_a_recording_sees_every_layer_once(tiny_model, text):
    model = tiny_model()
    with torch.no_grad(), moh.record_routing(model) as routing:
        model(text)
    assert len(routing) == model.config.num_hidden_layers
