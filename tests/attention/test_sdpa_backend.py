"""Promises of the `sdpa` backend alone: it computes active rows only, also in a compiled graph."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from attention_cases import ACTIVITIES, MASKS, Inputs, assert_like_reference, assert_same, gradients, make_inputs
from hypothesis import given
from hypothesis import strategies as st

import moh.attention.sdpa
from moh.attention import BACKENDS, moh_attention
from moh.attention.sdpa import packed_attention_op

SDPA = BACKENDS["sdpa"]


@pytest.fixture
def sdpa_calls(monkeypatch):
    """(rows, keys) of every call of PyTorch's attention, over batch and heads."""
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, *args, **kwargs):
        calls.append((q.shape[0] * q.shape[1] * q.shape[2], k.shape[2]))
        return original(q, k, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


def gates_with(heads_active: int, *, B: int = 2, N: int = 64, H: int = 8, groups: int = 2) -> torch.Tensor:
    """Gates of 1 for equally many heads in each key/value group; which heads differs from token to token."""
    gates = torch.zeros(B, N, groups, H // groups)
    for t in range(N):
        for j in range(heads_active // groups):
            gates[:, t, :, (t + j) % (H // groups)] = 1
    return gates.view(B, N, H)


@pytest.mark.parametrize("heads_active", [2, 4, 6, 8])
@pytest.mark.parametrize("is_causal", [pytest.param(False, id="full"), pytest.param(True, id="causal")])
def test_rows_worked_through_are_the_active_ones(sdpa_calls, heads_active, is_causal):
    q, k, v = torch.randn(2, 8, 64, 4), torch.randn(2, 2, 64, 4), torch.randn(2, 2, 64, 4)
    moh_attention(q, k, v, gates_with(heads_active), is_causal=is_causal, backend="sdpa")
    assert sum(rows for rows, _ in sdpa_calls) == 2 * 64 * heads_active


def test_work_of_a_decoded_token_falls_with_the_share(sdpa_calls):
    q, k, v = torch.randn(1, 8, 1, 4), torch.randn(1, 2, 64, 4), torch.randn(1, 2, 64, 4)
    moh_attention(q, k, v, gates_with(4, B=1, N=1), backend="sdpa")
    assert sdpa_calls == [(4, 64)]


@pytest.mark.parametrize("is_causal", [pytest.param(False, id="full"), pytest.param(True, id="causal")])
def test_uneven_heads_are_hardly_padded(sdpa_calls, is_causal):
    q, k, v = (torch.randn(1, 6, 100, 4) for _ in range(3))
    gates = torch.zeros(1, 100, 6)
    for head, load in enumerate([100, 10, 38, 100, 1, 40]):
        gates[:, :load, head] = 1
    moh_attention(q, k, v, gates, is_causal=is_causal, backend="sdpa")
    assert sum(rows for rows, _ in sdpa_calls) <= gates.sum() / 0.85


def test_heads_that_every_token_uses_are_one_call_by_themselves(sdpa_calls):
    q, k, v = (torch.randn(1, 3, 100, 4) for _ in range(3))
    gates = torch.ones(1, 100, 3)
    gates[:, 95:, 1] = 0
    moh_attention(q, k, v, gates, backend="sdpa")
    assert sorted(sdpa_calls) == [(95, 100), (200, 100)]


def test_few_queries_are_one_call_padded_to_the_fullest_head(sdpa_calls):
    q, k, v = (torch.randn(1, 4, 10, 4) for _ in range(3))
    gates = torch.zeros(1, 10, 4)
    gates[:, :3, 0] = 1
    gates[:, 4, 2] = 1
    moh_attention(q, k, v, gates, backend="sdpa")
    assert sdpa_calls == [(4 * 3, 10)]


def test_long_causal_call_leaves_most_of_the_keys_that_are_out_of_sight_out(sdpa_calls):
    N = 1024
    q, k, v = (torch.randn(1, 8, N, 4) for _ in range(3))
    gates = torch.zeros(1, N, 8)
    gates[:, ::2] = 1
    moh_attention(q, k, v, gates, is_causal=True, backend="sdpa")
    assert sum(rows for rows, _ in sdpa_calls) == 8 * N // 2
    scores = sum(rows * keys for rows, keys in sdpa_calls)
    assert scores < 0.7 * (8 * N // 2) * N  # nearly half are above the diagonal


@given(
    Hkv=st.integers(1, 4),
    G=st.integers(1, 3),
    Nq=st.integers(1, 9),
    Nk=st.integers(1, 9),
    activity=st.sampled_from(ACTIVITIES),
    mask=st.sampled_from(MASKS),
    is_causal=st.booleans(),
    rows=st.integers(1, 4),
    fill=st.sampled_from([0.5, 0.85, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_cut_into_runs_of_rows_and_groups_of_heads_is_like_the_reference(monkeypatch, rows, fill, **kind):
    monkeypatch.setattr(moh.attention.sdpa, "MIN_CHUNK_ROWS", rows)
    monkeypatch.setattr(moh.attention.sdpa, "MIN_BUCKET_QUERIES", 1)
    monkeypatch.setattr(moh.attention.sdpa, "BUCKET_FILL", fill)
    assert_like_reference(SDPA, make_inputs(D=4, **kind))


OP_CASES = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(is_causal=True), id="causal"),
    pytest.param(dict(mask="padding", scale=0.3, Nk=7), id="padding-own-scale"),
    pytest.param(dict(activity="all", dtype=torch.bfloat16), id="all-active-bfloat16"),
    pytest.param(dict(activity="none"), id="nothing-active"),
]


@pytest.mark.parametrize("kind", OP_CASES)
def test_operator_is_registered_correctly(kind):
    inputs = make_inputs(**kind)
    torch.library.opcheck(packed_attention_op, inputs.call[:7], atol=1e-5, rtol=1e-5)


def test_compiled_attention_is_one_graph_and_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(moh_attention, backend="aot_eager", fullgraph=True)
    for kind in (
        {},
        dict(is_causal=True),
        dict(mask="padding"),
        dict(mask="bool_2d"),
        dict(activity="none"),
        dict(Nq=70, activity="uneven"),
    ):
        inputs = make_inputs(**kind)
        expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="sdpa", **inputs.options)
        got = compiled(inputs.q, inputs.k, inputs.v, inputs.gates, backend="sdpa", **inputs.options)
        assert_same(got, expected, "output")
        weight = torch.randn_like(expected)
        expected_grads = gradients(expected, inputs, weight)
        for name, grad in gradients(got, inputs, weight).items():
            assert_same(grad, expected_grads[name], f"gradient of {name}")


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), reason="there is no C++ compiler"
)
def test_inductor_compiles_forward_and_backward_into_one_graph():
    torch.compiler.reset()
    inputs = make_inputs(is_causal=True)

    @torch.compile(fullgraph=True)
    def compiled(q, k, v, gates):
        return moh_attention(q * 2, k, v, gates.sin(), is_causal=True, backend="sdpa").cos()

    got = compiled(inputs.q, inputs.k, inputs.v, inputs.gates)
    expected = moh_attention(inputs.q * 2, inputs.k, inputs.v, inputs.gates.sin(), is_causal=True, backend="sdpa").cos()
    assert_same(got, expected, "output")
    weight = torch.randn_like(expected)
    expected_grads = gradients(expected, inputs, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


def test_compiled_learned_bias_gets_its_gradient():
    torch.compiler.reset()
    inputs = make_inputs(mask="bias_per_head")
    compiled = torch.compile(moh_attention, backend="aot_eager")  # two graphs: Python reads the number of rows
    got = compiled(inputs.q, inputs.k, inputs.v, inputs.gates, backend="sdpa", **inputs.options)
    expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="sdpa", **inputs.options)
    weight = torch.randn_like(expected)
    assert_same(got, expected, "output")
    assert_same(gradients(got, inputs, weight)["attn_mask"], gradients(expected, inputs, weight)["attn_mask"], "mask")


def test_compiled_dropout_still_drops():
    torch.compiler.reset()
    inputs = make_inputs(activity="half")
    compiled = torch.compile(moh_attention, backend="aot_eager")
    arguments = (inputs.q, inputs.k, inputs.v, inputs.gates)
    dropped, whole = compiled(*arguments, dropout_p=0.5, backend="sdpa"), compiled(*arguments, backend="sdpa")
    assert not torch.equal(dropped, whole)


def test_all_heads_active_is_one_call_without_gathering(sdpa_calls):
    inputs = make_inputs(activity="all", is_causal=True)
    moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, is_causal=True, backend="sdpa")
    assert sdpa_calls == [(2 * 4 * 5, 5)]


def test_inputs_are_left_as_they_were():
    inputs = make_inputs(mask="bias_per_head", is_causal=True)
    copies = [t.detach().clone() for t in inputs.tensors.values()]
    moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="sdpa", **inputs.options).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs.tensors.values(), copies, strict=True))
    assert isinstance(inputs, Inputs)


def test_unusual_masks_leave_the_settings_of_pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sdpa_kernel` switches kernels for all threads of a process, and two threads can leave them off."""

    def refuse(*args: object) -> None:
        raise AssertionError("a setting of the whole process was changed")

    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", refuse)
    for name in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_math_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, refuse)
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)
    found = moh_attention(q, k, v, torch.ones(1, 3, 2), attn_mask=mask, backend="sdpa")
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand(-1, -1, 3, -1).transpose(1, 2))
