"""Promises of backend `straight_through`: the definition's outputs, and the paper's gradient for gates that are 0 too."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, make_inputs

from moh import MoHAttention
from moh.attention import BACKENDS, moh_attention

NAME = "straight_through"


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", ["none", "padding", "bias_per_head"])
def test_outputs_are_the_definitions_and_every_gate_has_its_heads_gradient(mask, is_causal):
    inputs = make_inputs(mask=mask, is_causal=is_causal)
    call = dict(attn_mask=inputs.attn_mask, is_causal=is_causal)
    q, k, v, gates = inputs.q, inputs.k, inputs.v, inputs.gates
    got = moh_attention(q, k, v, gates, backend=NAME, **call)
    assert_same(got, moh_attention(q, k, v, gates, backend="reference", **call), "output")
    every = moh_attention(q, k, v, torch.ones_like(gates), backend="reference", **call)  # each head as if active
    weight = torch.randn_like(got)
    found = torch.autograd.grad((got * weight).sum(), [q, k, v, gates])
    expected = torch.autograd.grad((every * gates[..., None] * weight).sum(), [q, k, v, gates])
    for name, a, b in zip(("q", "k", "v", "gates"), found, expected, strict=True):
        assert_same(a, b, f"gradient of {name}")
    assert (gates == 0).any() and found[3][gates == 0].abs().max() > 0.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_head_that_is_not_finite_and_not_active_does_not_reach_the_output(value):
    inputs = make_inputs()
    q, k, v, gates = inputs.q, inputs.k, inputs.v, inputs.gates.detach().clone()
    gates[:, :, 0] = 0.0
    if value != value:
        q = q.detach().clone()
        q[:, 0] = value
    else:
        k = k.detach().clone()
        v = v.detach().clone()
        q = q.detach()
        group = q.shape[1] // v.shape[1]
        v[:, 0] = value
        gates[:, :, :group] = 0.0  # all heads that read these values
    got = moh_attention(q, k, v, gates, backend=NAME)
    assert got.isfinite().all() and (got[:, :, 0] == 0).all()
    if value != value:
        assert_same(got, moh_attention(q, k, v, gates, backend="reference"), "output")


def test_it_is_used_only_by_name_and_named_among_the_others():
    inputs = make_inputs()
    assert NAME not in BACKENDS
    with pytest.raises(ValueError, match=r"backend must be None or one of 'cpu', .*, 'straight_through', got 'dense'"):
        moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="dense")


@pytest.mark.parametrize("router", ["query_norm", "linear"])
def test_a_layers_routing_gets_the_gradient_of_heads_that_it_did_not_choose(router):
    torch.manual_seed(0)
    layer = MoHAttention(32, 8, shared_heads=2, active_heads=2, router=router)
    x = torch.randn(2, 80, 32)
    outputs, gradients = [], []
    for backend in (None, NAME):
        layer.backend = backend
        layer.zero_grad()
        out = layer(x, is_causal=True)
        out.square().sum().backward()
        learns = layer.q_proj.weight if router == "query_norm" else layer.router.contribution.weight
        outputs.append(out.detach())
        gradients.append(learns.grad.clone())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() > 0.02 * gradients[0].norm()
