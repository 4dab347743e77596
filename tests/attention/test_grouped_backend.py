"""Promises of the backend for equally many heads in every key/value group: exact, static shapes, chosen if promised.

The conformance suite compares it with the definition.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import Inputs, assert_same, gradients, make_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import moh.attention.backends
from moh import MoHConfig
from moh.attention import BACKENDS, Call, backends_passed_over, choose_backend, moh_attention
from moh.routing import build_router


def routed(*, Nq: int, Nk: int | None = None, active=3, Hkv=3, G=3, B=2, seed=0, **options) -> tuple[Inputs, MoHConfig]:
    """Random inputs with gates from a router."""
    config = MoHConfig(Hkv * G, 0, active, "two_stage", routing_unit="group_balanced", kv_heads=Hkv)
    inputs = make_inputs(B=B, Hkv=Hkv, G=G, Nq=Nq, Nk=Nk, seed=seed, **options)
    x = torch.randn(B, Nq, 8, generator=torch.Generator().manual_seed(seed))
    inputs.gates = build_router(config, 8)(x).gates.detach().to(inputs.q.dtype).requires_grad_()
    return inputs, config


def call(inputs: Inputs, backend: str | None, config: MoHConfig):
    return moh_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.gates,
        backend=backend,
        heads_per_group=config.heads_per_group,
        **inputs.options,
    )


def assert_exact(inputs: Inputs, config: MoHConfig) -> None:
    got, expected = call(inputs, "grouped", config), call(inputs, "reference", config)
    assert_same(got, expected, "output")
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients(expected, inputs, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, wanted[name], f"gradient of {name}")


@pytest.mark.parametrize("mask", ["none", "padding", "bool_full", "blind_rows", "bias_per_head", "bias_per_key"])
@pytest.mark.parametrize(
    "Nq, Nk, is_causal",
    [
        pytest.param(9, 9, True, id="prefill"),
        pytest.param(1, 9, False, id="decode"),
        pytest.param(1, 9, True, id="one-causal"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("active", [3, 6], ids=["third", "two-thirds"])
def test_routed_heads_are_served_like_the_reference(Nq, Nk, is_causal, mask, dtype, active):
    inputs, config = routed(Nq=Nq, Nk=Nk, is_causal=is_causal, mask=mask, dtype=dtype, active=active)
    assert_exact(inputs, config)


@given(
    B=st.integers(1, 3),
    Hkv=st.integers(1, 4),
    G=st.integers(1, 4),
    per=st.integers(1, 4),
    Nq=st.integers(1, 6),
    Nk=st.integers(1, 6),
    mask=st.sampled_from(["none", "padding", "blind_rows", "bias_per_head"]),
    is_causal=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape_is_served_like_the_reference(Hkv, G, per, **kind):
    assert_exact(*routed(Hkv=Hkv, G=G, active=Hkv * min(per, G), **kind))


def test_a_token_that_uses_fewer_heads_than_it_may_is_served():
    inputs, config = routed(Nq=5, active=6)
    gates = inputs.gates.detach().clone()
    gates[:, 1] = 0
    gates[:, 2, :3] = 0
    inputs.gates = gates.requires_grad_()
    assert_exact(inputs, config)


@pytest.mark.parametrize("Nq", [6, 1])
def test_shapes_are_static_so_that_compiling_keeps_one_graph(Nq):
    torch.compiler.reset()
    inputs, config = routed(Nq=Nq, Nk=6, is_causal=Nq > 1)
    compiled = torch.compile(lambda: call(inputs, "grouped", config), backend="aot_eager", fullgraph=True)
    weight = torch.randn(2, Nq, 9, 8)
    out, expected = compiled(), call(inputs, "grouped", config)
    assert_same(out, expected, "output")
    wanted = gradients(expected, inputs, weight)
    for name, grad in gradients(out, inputs, weight).items():
        assert_same(grad, wanted[name], name)


def test_autocast_runs_it_in_bfloat16():
    inputs, config = routed(Nq=5, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(inputs, "grouped", config)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), call(inputs, "grouped", config), rtol=0.05, atol=0.05)


def test_it_serves_where_no_kernel_of_ours_does(monkeypatch):
    inputs, config = routed(Nq=5)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.gates)
    doubles = [t.double() for t in tensors]  # the C++ kernels have no float64
    assert choose_backend(Call(*doubles, heads_per_group=config.heads_per_group)).name == "grouped"
    assert choose_backend(Call(*doubles)).name != "grouped"
    meta = [t.to("meta") for t in tensors]
    assert choose_backend(Call(*meta, heads_per_group=1)).name == "grouped"
    monkeypatch.setattr(moh.attention.backends, "BACKENDS", {n: b for n, b in BACKENDS.items() if n != "grouped"})
    assert choose_backend(Call(*doubles, heads_per_group=config.heads_per_group)).name == "sdpa"


@pytest.mark.parametrize("mask", ["none", "padding", "blind_rows", "bias_per_head"])
@pytest.mark.parametrize(("Nq", "is_causal"), [(6, True), (6, False), (1, False)])
@pytest.mark.parametrize("G", [1, 3])
def test_without_a_limit_it_computes_all_heads_and_is_used_by_name_alone(Nq, is_causal, mask, G):
    config = MoHConfig(3 * G, 1, 2, "two_stage")
    inputs = make_inputs(B=2, Hkv=3, G=G, Nq=Nq, Nk=6, is_causal=is_causal, mask=mask)
    inputs.gates = build_router(config, 8)(torch.randn(2, Nq, 8)).gates.detach().requires_grad_()
    assert_exact(inputs, config)
    passed_over = backends_passed_over(inputs.call._replace(q=inputs.q.detach()))
    assert "computes all heads without heads_per_group" in str(passed_over["grouped"])


def test_a_choice_of_all_heads_gathers_nothing():
    inputs, _ = routed(Nq=6, is_causal=True)
    tensors = [t.detach() for t in (inputs.q, inputs.k, inputs.v, inputs.gates)]
    graph = make_fx(lambda *t: moh_attention(*t, is_causal=True, backend="grouped"))(*tensors).graph
    assert not {"gather", "scatter", "topk"} & {
        str(node.target).split(".")[1] for node in graph.nodes if "." in str(node.target)
    }


@pytest.mark.parametrize("limit", [0, 4])
def test_limits_out_of_range_are_refused(limit):
    inputs, _ = routed(Nq=2)
    with pytest.raises(ValueError, match=f"heads_per_group must be between 1 and 3, got {limit}"):
        moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, heads_per_group=limit)
