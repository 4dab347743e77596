"""Promises of `moh_attention` to its caller: clear errors, an honest choice of backend, autocast."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BACKENDS as EACH_BACKEND
from attention_cases import Inputs, assert_same, attend, make_inputs

import moh.attention.backends
from moh.attention import BACKENDS, Backend, Call, choose_backend, cpu, moh_attention

Q, K, V, GATES = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.ones(2, 5, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(dict(q=Q[0]), r"q must have 4 dimensions .*got shape \(4, 5, 8\)", id="q-3d"),
        pytest.param(dict(k=K[0]), r"k must have 4 dimensions .*got shape \(2, 6, 8\)", id="k-3d"),
        pytest.param(dict(v=V[..., 0]), r"v must have 4 dimensions .*got shape \(2, 2, 6\)", id="v-3d"),
        pytest.param(
            dict(q=Q[:, :3], gates=GATES[..., :3]), "multiple of k's 2 heads, got 3", id="heads-do-not-divide"
        ),
        pytest.param(dict(k=K[:, :0], v=V[:, :0]), "multiple of k's 0 heads, got 4", id="no-key-heads"),
        pytest.param(dict(k=K[:1]), r"k must have shape \[B = 2, .*got \(1, 2, 6, 8\)", id="k-batch"),
        pytest.param(dict(k=K[..., :7]), r"k must have shape .*D = 8\] to match q, got \(2, 2, 6, 7\)", id="k-width"),
        pytest.param(dict(v=V[:, :, :5]), r"v must have shape .*to match k, got \(2, 2, 5, 8\)", id="v-length"),
        pytest.param(dict(v=V[:, :1]), r"v must have shape .*to match k, got \(2, 1, 6, 8\)", id="v-heads"),
        pytest.param(
            dict(gates=GATES[:, :4]), r"gates must have shape .*\(2, 5, 4\), got \(2, 4, 4\)", id="gates-tokens"
        ),
        pytest.param(
            dict(gates=GATES.mT), r"gates must have shape .*\(2, 5, 4\), got \(2, 4, 5\)", id="gates-transposed"
        ),
        pytest.param(dict(gates=GATES.bool()), "one floating-point dtype, got .*torch.bool", id="gates-bool"),
        pytest.param(dict(k=K.double()), "one floating-point dtype, got torch.float32, torch.float64", id="k-dtype"),
        pytest.param(
            dict(q=Q.long(), k=K.long(), v=V.long(), gates=GATES.long()), "one floating-point dtype", id="integers"
        ),
        pytest.param(
            dict(attn_mask=torch.ones(5, 5).bool()),
            r"broadcastable to .*\(2, 4, 5, 6\), got shape \(5, 5\)",
            id="mask-shape",
        ),
        pytest.param(dict(attn_mask=torch.ones(1, 1, 1, 5, 6).bool()), "broadcastable to", id="mask-5d"),
        pytest.param(dict(attn_mask=torch.ones(3, 1, 5, 6).bool()), "broadcastable to", id="mask-batch"),
        pytest.param(
            dict(attn_mask=torch.ones(5, 6).long()),
            "bool or of q's dtype torch.float32, got torch.int64",
            id="mask-int",
        ),
        pytest.param(dict(attn_mask=torch.ones(5, 6).double()), "got torch.float64", id="mask-dtype"),
        pytest.param(dict(dropout_p=1.0), "dropout_p must be at least 0 and below 1, got 1.0", id="dropout-1"),
        pytest.param(dict(dropout_p=-0.1), "dropout_p must be at least 0 and below 1, got -0.1", id="dropout-negative"),
        pytest.param(
            dict(backend="fast"), "backend must be None or one of 'cpu', 'grouped', .*got 'fast'", id="backend"
        ),
    ],
)
def test_bad_argument_is_refused_by_name_and_value(change, message):
    arguments = dict(q=Q, k=K, v=V, gates=GATES) | change
    with pytest.raises(ValueError, match=message):
        moh_attention(**arguments)


def test_good_arguments_are_not_refused():
    assert moh_attention(Q, K, V, GATES, attn_mask=torch.ones(5, 6).bool()).shape == (2, 5, 4, 8)


@pytest.mark.parametrize("shape", [(), (6,), (5, 1), (4, 1, 6), (2, 1, 1, 1), (1, 4, 5, 6)], ids=str)
def test_mask_of_any_broadcastable_shape_is_that_mask_expanded(shape):
    gates = torch.where(torch.rand(2, 5, 4) < 0.5, 1.0, 0.0)
    for mask in (torch.rand(shape) < 0.6, torch.randn(shape)):
        got = moh_attention(Q, K, V, gates, attn_mask=mask, is_causal=True)
        full = mask.expand(2, 4, 5, 6).contiguous()
        assert_same(got, moh_attention(Q, K, V, gates, attn_mask=full, is_causal=True, backend="reference"), "output")


def test_default_backend_is_cpu_where_it_serves_and_sdpa_elsewhere():
    assert choose_backend(Call(Q, K, V, GATES)).name == ("cpu" if cpu.unavailable() is None else "sdpa")
    assert choose_backend(Call(*(t.double() for t in (Q, K, V, GATES)))).name == "sdpa"
    assert choose_backend(Call(*(t.to("meta") for t in (Q, K, V, GATES)))).name == "sdpa"


def test_backend_that_cannot_serve_the_call_is_passed_over_and_says_why_when_named(monkeypatch):
    usual = choose_backend(Call(Q, K, V, GATES))
    broken = Backend(
        "broken", "never works", lambda call: pytest.fail("must not be called"), lambda call: "it is broken"
    )
    monkeypatch.setattr(moh.attention.backends, "BACKENDS", {"broken": broken} | BACKENDS)
    assert choose_backend(Call(Q, K, V, GATES)) == usual
    moh_attention(Q, K, V, GATES)
    with pytest.raises(ValueError, match="backend 'broken' can't handle this call: it is broken"):
        moh_attention(Q, K, V, GATES, backend="broken")


def test_backends_have_names_and_a_line_for_the_reader():
    # from the most preferred to the last resort
    assert list(BACKENDS) == ["cpu", "grouped", "triton", "flex", "sdpa", "reference"]
    assert all(b.name == name for name, b in BACKENDS.items())
    assert all(b.description and "\n" not in b.description for b in BACKENDS.values())


@pytest.mark.parametrize("backend", EACH_BACKEND)
@pytest.mark.parametrize("mask", ["none", "bias_per_head", "padding"])
def test_autocast_takes_mixed_dtypes_and_gives_its_own(backend, mask):
    inputs = make_inputs(mask=mask)
    low = [t.detach().bfloat16() for t in (inputs.q, inputs.k, inputs.v, inputs.gates)]
    low_mask = inputs.attn_mask.bfloat16() if mask == "bias_per_head" else inputs.attn_mask
    expected = moh_attention(*low, attn_mask=low_mask, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(backend, Inputs(inputs.q, low[1], inputs.v, inputs.gates, inputs.attn_mask))
    assert got.dtype == torch.bfloat16
    assert_same(got, expected, "output")
    got.sum().backward()
    assert inputs.q.grad.dtype == inputs.gates.grad.dtype == torch.float32


def test_mixed_dtypes_without_autocast_are_refused():
    with pytest.raises(ValueError, match="one floating-point dtype"):
        moh_attention(Q, K.bfloat16(), V, GATES)
