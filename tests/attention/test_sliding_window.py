"""Promises of the sliding window: every backend hides the same keys, alone and together with a mask."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BACKENDS, Inputs, assert_same, attend, gradients, make_inputs

import moh


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["none", "padding", "bool_2d", "bias_per_key"])
@pytest.mark.parametrize("shape", [dict(Nq=5), dict(Nq=150, B=1), dict(Nq=90, Nk=200, B=1)], ids=["5", "150", "90-200"])
@pytest.mark.parametrize("window", [1, 3, 70, 1000])
def test_window_is_a_band_in_the_mask(backend, mask, shape, window):
    inputs = make_inputs(mask=mask, is_causal=True, **shape)
    if inputs.attn_mask is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
    Nq, Nk = inputs.q.shape[2], inputs.k.shape[2]
    band = torch.ones(Nq, Nk, dtype=torch.bool).tril().triu(1 - window)
    if inputs.attn_mask is None or inputs.attn_mask.dtype == torch.bool:
        full = band if inputs.attn_mask is None else inputs.attn_mask & band
    else:
        full = inputs.attn_mask.masked_fill(~band, -torch.inf)
    got = attend(backend, inputs, sliding_window=window)
    banded = Inputs(inputs.q, inputs.k, inputs.v, inputs.gates, full)
    expected = moh.moh_attention(banded.q, banded.k, banded.v, banded.gates, attn_mask=full, backend="reference")
    assert_same(got, expected, "output")
    weight = torch.randn_like(expected)
    inputs.attn_mask = banded.attn_mask = None  # has no gradient here
    expected_grads = gradients(expected, banded, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


@pytest.mark.parametrize("window, is_causal", [(0, True), (-1, True), (3, False)])
def test_window_that_makes_no_sense_is_refused(window, is_causal):
    x = make_inputs()
    with pytest.raises(ValueError, match=f"sliding_window must be at least 1 and needs is_causal=True, got {window}"):
        moh.moh_attention(x.q, x.k, x.v, x.gates, is_causal=is_causal, sliding_window=window)


def test_a_window_as_long_as_the_queries_costs_no_mask(monkeypatch):
    x = make_inputs(Nq=6, Nk=9, is_causal=True)
    made = []
    monkeypatch.setattr("moh.attention.dispatch._with_window", lambda *args: made.append(args))
    for window in (6, 2**40):
        got = moh.moh_attention(x.q, x.k, x.v, x.gates, is_causal=True, sliding_window=window, backend="sdpa")
        assert torch.equal(got, moh.moh_attention(x.q, x.k, x.v, x.gates, is_causal=True, backend="sdpa"))
    assert not made
    moh.moh_attention(x.q, x.k, x.v, x.gates, is_causal=True, sliding_window=5, backend="sdpa")
    assert len(made) == 1
