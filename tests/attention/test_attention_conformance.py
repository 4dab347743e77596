"""Promises that every attention backend keeps; a new backend only has to be in `moh.attention.BACKENDS`."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    ACTIVITIES,
    BACKENDS,
    EVERY_BACKEND,
    FAST_BACKENDS,
    MASKS,
    SHAPES,
    SPECIAL_MASKS,
    Inputs,
    assert_like_reference,
    assert_same,
    attend,
    gradients,
    make_inputs,
)
from covering import covering
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moh.attention.call import hide

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_fast_backend = pytest.mark.parametrize("backend", FAST_BACKENDS)
FULL_OR_CAUSAL = [pytest.param(False, id="full"), pytest.param(True, id="causal")]
causal_or_not = pytest.mark.parametrize("is_causal", FULL_OR_CAUSAL)


def _fill_free_memory(like: Tensor) -> None:
    """Leave NaN in memory that a result of this size is likely to get, so that one that isn't written shows."""
    for spoilt in [torch.full_like(like, math.nan) for _ in range(20)]:
        del spoilt


def by_hand(inputs: Inputs) -> Tensor:
    """Routed attention by loops over (token, head) pairs and over scores."""
    q, k, v, gates = (t.detach().tolist() for t in (inputs.q, inputs.k, inputs.v, inputs.gates))
    B, H, Nq, D = inputs.q.shape
    Nk, group = inputs.k.shape[2], H // inputs.k.shape[1]
    scale = 1 / math.sqrt(D) if inputs.scale is None else inputs.scale
    mask = None if inputs.attn_mask is None else inputs.attn_mask.detach().expand(B, H, Nq, Nk).tolist()
    out = torch.zeros(B, Nq, H, D, dtype=torch.float64)
    for b in range(B):
        for i in range(H):
            for t in range(Nq):
                weights = []
                for s in range(Nk):
                    score = scale * sum(x * y for x, y in zip(q[b][i][t], k[b][i // group][s], strict=True))
                    rule = 0.0 if mask is None else mask[b][i][t][s]
                    if rule is False or (inputs.is_causal and s > t):
                        score = -math.inf
                    elif rule is not True:
                        score += rule
                    weights.append(math.exp(score))
                total = sum(weights)
                for s, weight in enumerate(weights):
                    if total > 0:
                        out[b, t, i] += gates[b][t][i] * weight / total * torch.tensor(v[b][i // group][s]).double()
    return out


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_plain_call_is_served_like_the_reference(backend):
    assert_like_reference(backend, make_inputs())


@every_backend
@causal_or_not
@pytest.mark.parametrize("mask", MASKS)
def test_output_is_that_of_the_equations(backend, mask, is_causal):
    inputs = make_inputs(mask=mask, is_causal=is_causal, Nq=3, Nk=4, D=3)
    assert_same(attend(backend, inputs), by_hand(inputs).float(), "output")


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_are_served_like_the_reference(backend, shape, is_causal):
    assert_like_reference(backend, make_inputs(is_causal=is_causal, **shape))


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize("activity", ACTIVITIES)
def test_activities_are_served_like_the_reference(backend, activity, is_causal):
    assert_like_reference(backend, make_inputs(activity=activity, is_causal=is_causal))


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize("activity", ["all", "random", "uneven"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_served_like_the_reference(backend, mask, activity, is_causal):
    assert_like_reference(backend, make_inputs(mask=mask, activity=activity, is_causal=is_causal, Nk=6))


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize("activity", ["all", "random", "uneven", "idle_head"])
@pytest.mark.parametrize("mask", ["none", "padding", "bool_full", "blind_rows", "bias_per_head"])
def test_long_inputs_are_served_like_the_reference(backend, mask, activity, is_causal):
    for shape in (dict(B=1, Hkv=1, G=2, Nq=260), dict(B=2, Hkv=4, G=1, Nq=70), dict(B=1, Hkv=3, G=2, Nq=70, Nk=50)):
        assert_like_reference(backend, make_inputs(**shape, D=4, mask=mask, activity=activity, is_causal=is_causal))


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize("mask", ["none", "bool_full", "blind_rows", "bias_per_head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d).split(".")[-1])
def test_dtypes_are_served_like_the_reference(backend, dtype, mask, is_causal):
    assert_like_reference(backend, make_inputs(dtype=dtype, mask=mask, is_causal=is_causal, Nq=6, D=16))


@covering(
    3,
    backend=FAST_BACKENDS,
    is_causal=FULL_OR_CAUSAL,
    size=[
        pytest.param(dict(Nk=6), id="N5"),
        pytest.param(dict(Nq=70), id="N70"),
        pytest.param(dict(Nq=1, Nk=9), id="one-query"),
    ],
    activity=["all", "random", "idle_head"],
    mask=SPECIAL_MASKS,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_special_masks_are_served_like_the_reference(backend, dtype, mask, activity, size, is_causal):
    assert_like_reference(
        backend, make_inputs(mask=mask, activity=activity, is_causal=is_causal, dtype=dtype, D=16, **size)
    )


@causal_or_not
@pytest.mark.parametrize("mask", [*MASKS[1:], *SPECIAL_MASKS])
def test_masks_are_read_as_by_the_plain_formula_of_pytorch(mask, is_causal):
    inputs = make_inputs(mask=mask, activity="all", is_causal=is_causal, Nk=6)
    inputs.gates = torch.ones_like(inputs.gates)
    inputs.attn_mask = inputs.call.attn_mask.detach()
    seen = torch.ones(5, 6, dtype=torch.bool).tril() if is_causal else torch.ones(5, 6, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(
            inputs.q, inputs.k, inputs.v, hide(inputs.attn_mask, seen), enable_gqa=True
        )
    assert_same(attend(BACKENDS[-1].values[0], inputs), expected.transpose(1, 2), "output")


@every_backend
@causal_or_not
@pytest.mark.parametrize("number", ["lowest", "-inf", "False", "nan", "inf"])
@pytest.mark.parametrize("N", [4, 40])
def test_row_with_one_number_throughout_is_the_average_hidden_or_nan(backend, N, number, is_causal):
    inputs = make_inputs(Nq=N, Nk=N, activity="all", is_causal=is_causal)
    mask = torch.ones(N, N, dtype=torch.bool) if number == "False" else torch.zeros(N, N)
    mask[2] = torch.finfo(torch.float32).min if number == "lowest" else False if number == "False" else float(number)
    inputs.attn_mask = mask
    row = attend(backend, inputs)[:, 2] / inputs.gates[:, 2, :, None]
    keys = slice(0, 3 if is_causal else N)
    average = inputs.v[:, :, keys].mean(2).repeat_interleave(2, dim=1)
    expected = {"lowest": average, "nan": average * math.nan, "inf": average * math.nan}.get(number, average * 0)
    torch.testing.assert_close(row, expected, equal_nan=True)


@every_backend
@pytest.mark.parametrize("number", [math.nan, math.inf], ids=str)
def test_mask_of_an_inactive_head_is_not_read(backend, number):
    inputs = make_inputs(activity="half", Nk=6)  # heads 1 and 3
    clean = attend(backend, inputs)
    inputs.attn_mask = torch.zeros(4, 5, 6)
    inputs.attn_mask[[0, 2]] = number
    assert_same(attend(backend, inputs), clean, "output")


@every_fast_backend
@given(
    B=st.integers(1, 3),
    Hkv=st.integers(1, 3),
    G=st.integers(1, 3),
    Nq=st.integers(1, 7),
    Nk=st.integers(1, 7),
    D=st.integers(1, 9),
    activity=st.sampled_from(ACTIVITIES),
    mask=st.sampled_from(MASKS),
    is_causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_anything_is_served_like_the_reference(backend, **kind):
    assert_like_reference(backend, make_inputs(**kind))


@every_backend
@causal_or_not
@pytest.mark.parametrize("mask", ["none", "blind_rows", "bias_per_head"])
def test_gradients_are_those_of_finite_differences(backend, mask, is_causal):
    inputs = make_inputs(B=1, Hkv=1, Nq=3, Nk=4, D=2, mask=mask, is_causal=is_causal, dtype=torch.float64)
    active = inputs.gates.detach() != 0
    assert not active.all()
    # the gradient of an inactive gate is defined, not measured: a step away from 0 would make the head active
    active_gates = inputs.gates.detach()[active].requires_grad_()

    def attention(q: Tensor, k: Tensor, v: Tensor, active_gates: Tensor, mask: Tensor | None) -> Tensor:
        gates = torch.zeros_like(inputs.gates).masked_scatter(active, active_gates)
        return attend(backend, Inputs(q, k, v, gates, mask, is_causal))

    assert torch.autograd.gradcheck(attention, (inputs.q, inputs.k, inputs.v, active_gates, inputs.attn_mask))


@every_backend
@causal_or_not
@pytest.mark.parametrize("N", [5, 70])
def test_inactive_heads_cost_nothing_in_output_and_gradient(backend, N, is_causal):
    inputs = make_inputs(is_causal=is_causal, Nq=N, activity="uneven")
    idle = inputs.gates == 0
    out = attend(backend, inputs)
    grads = gradients(out, inputs, torch.randn_like(out))
    assert idle.any() and not idle.all()
    assert (out[idle] == 0).all()
    assert (grads["gates"][idle] == 0).all()
    assert (grads["q"].transpose(1, 2)[idle] == 0).all()
    assert (grads["gates"][~idle] != 0).all()
    assert (out[~idle] != 0).all()


@every_backend
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("N", [1, 5, 70])
def test_nothing_active_gives_0_and_gradients_of_0(backend, N, dtype, is_causal):
    inputs = make_inputs(activity="none", Nq=N, dtype=dtype, is_causal=is_causal)
    _fill_free_memory(inputs.k)
    out = attend(backend, inputs)
    assert (out == 0).all()
    for name, grad in gradients(out, inputs, torch.ones_like(out)).items():
        assert (grad == 0).all(), name


@every_backend
@pytest.mark.parametrize("activity", ["all", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["bool", "float", "float-per-head"])
@causal_or_not
def test_query_that_may_see_no_key_gives_0_and_finite_gradients(backend, how, dtype, activity, is_causal):
    inputs = make_inputs(activity=activity, dtype=dtype, is_causal=is_causal)
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    mask = seen if how == "bool" else torch.zeros(5, 5, dtype=dtype).masked_fill(~seen, -torch.inf)
    inputs.attn_mask = mask.expand(2, 4, 5, 5).clone() if how == "float-per-head" else mask
    if how != "bool":
        inputs.attn_mask.requires_grad_()
    out = attend(backend, inputs)
    assert (out[:, 2] == 0).all()
    assert (out[:, [0, 1, 3, 4]] != 0).any(-1).sum() == (inputs.gates[:, [0, 1, 3, 4]] != 0).sum()
    grads = gradients(out, inputs, torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["q"][:, :, 2] == 0).all()
    assert (grads["gates"][:, 2] == 0).all()


@every_backend
@causal_or_not
@pytest.mark.parametrize("activity", ["all", "random"])
def test_nan_of_an_active_query_stays_in_its_row(backend, activity, is_causal):
    inputs = make_inputs(activity=activity, is_causal=is_causal)
    clean = attend(backend, inputs)
    b, t, i = (inputs.gates != 0).nonzero()[3].tolist()
    spoilt = inputs.q.detach().clone()
    spoilt[b, i, t, 0] = math.nan
    inputs.q = spoilt
    with torch.no_grad():
        out = attend(backend, inputs)
    out[b, t, i] = clean[b, t, i]  # most kernels return NaN, one of PyTorch's returns 0
    assert_same(out, clean, "the other rows")


@every_backend
@causal_or_not
@pytest.mark.parametrize("bad", [pytest.param(math.nan, id="nan"), pytest.param(math.inf, id="inf")])
@pytest.mark.parametrize("N", [5, 70])
@pytest.mark.parametrize("activity", ["random", "half", "uneven", "one_pair", "none"])
def test_nan_of_an_inactive_head_reaches_neither_output_nor_gradients(backend, activity, N, bad, is_causal):
    inputs = make_inputs(activity=activity, is_causal=is_causal, Nq=N)
    weight = torch.randn(2, N, 4, 8)
    clean = attend(backend, inputs)
    expected = gradients(clean, inputs, weight)
    idle = (inputs.gates == 0).transpose(1, 2)[..., None]  # [B, H, Nq, 1]
    inputs.q = inputs.q.detach().masked_fill(idle, bad).requires_grad_()
    out = attend(backend, inputs)
    assert_same(out, clean, "output")
    for name, grad in gradients(out, inputs, weight).items():
        assert_same(grad, expected[name], f"gradient of {name}")


@every_backend
def test_nan_in_keys_and_values_that_no_active_head_reads_reaches_no_output_and_no_gate(backend):
    inputs = make_inputs(activity="all", Hkv=2, G=2)
    inputs.gates = inputs.gates.detach().clone()
    inputs.gates[..., 2:] = 0  # both heads of the second key/value head
    inputs.gates.requires_grad_()
    clean = attend(backend, inputs)
    for name in ("k", "v"):
        spoilt = getattr(inputs, name).detach().clone()
        spoilt[:, 1] = math.nan
        setattr(inputs, name, spoilt.requires_grad_())
    out = attend(backend, inputs)
    assert_same(out, clean, "output")
    assert (gradients(out, inputs, torch.randn_like(out))["gates"][..., 2:] == 0).all()


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize(
    "dtype, size",
    [
        pytest.param(torch.float32, 1e4, id="float32"),
        pytest.param(torch.bfloat16, 1e4, id="bfloat16"),
        pytest.param(torch.float16, 300.0, id="float16-scores-beyond-its-range"),
    ],
)
def test_very_large_logits_give_the_reference(backend, dtype, size, is_causal):
    inputs = make_inputs(dtype=dtype, is_causal=is_causal, D=16)
    sure = Inputs(inputs.q.detach() * size, inputs.k.detach() * size, inputs.v, inputs.gates, is_causal=is_causal)
    expected = attend(BACKENDS[-1].values[0], sure)
    assert_same(attend(backend, sure), expected, "output")


@every_backend
@causal_or_not
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(dict(B=0), id="no-sequences"),
        pytest.param(dict(Nq=0, Nk=4), id="no-queries"),
        pytest.param(dict(Nq=4, Nk=0), id="no-keys"),
        pytest.param(dict(Nq=0, Nk=0), id="no-tokens"),
        pytest.param(dict(G=0), id="no-heads"),
        pytest.param(dict(G=0, Nq=40), id="no-heads-of-many-queries"),
        pytest.param(dict(G=0, Nk=0), id="neither-heads-nor-keys"),
        pytest.param(dict(Dv=0), id="values-of-width-0"),
    ],
)
def test_empty_inputs_give_0_and_gradients_for_all(backend, size, is_causal):
    inputs = make_inputs(is_causal=is_causal, **size)
    _fill_free_memory(inputs.k)
    out = attend(backend, inputs)
    assert out.shape == (*inputs.gates.shape, inputs.v.shape[-1])
    assert (out == 0).all()
    for name, grad in gradients(out, inputs, torch.ones_like(out)).items():
        assert grad.shape == inputs.tensors[name].shape
        assert (grad == 0).all(), name


@every_fast_backend
@causal_or_not
@pytest.mark.parametrize("activity", ["all", "random"])
def test_non_contiguous_inputs_are_served_like_the_reference(backend, activity, is_causal):
    inputs = make_inputs(activity=activity, is_causal=is_causal, Nk=6, mask="bool_full")
    contiguous = attend(backend, inputs)
    inputs.q = inputs.q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    inputs.k = torch.cat([inputs.k.detach()] * 2, dim=2)[:, :, :6].requires_grad_()
    inputs.v = inputs.v.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    inputs.gates = inputs.gates.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    inputs.attn_mask = inputs.attn_mask.transpose(-2, -1).contiguous().transpose(-2, -1)
    assert not any(t.is_contiguous() for t in (inputs.q, inputs.k, inputs.v, inputs.gates, inputs.attn_mask))
    torch.testing.assert_close(attend(backend, inputs), contiguous)
    assert_like_reference(backend, inputs)


@every_fast_backend
def test_gates_shared_by_all_tokens_are_served_like_the_reference(backend):
    inputs = make_inputs()
    inputs.gates = torch.tensor([0.5, 0.0, 0.0, 2.0]).expand(2, 5, 4).requires_grad_()
    assert_like_reference(backend, inputs)


@every_backend
def test_output_does_not_depend_on_the_rest_of_the_batch(backend):
    inputs = make_inputs(B=3)
    whole = attend(backend, inputs)
    alone = Inputs(inputs.q[1:2], inputs.k[1:2], inputs.v[1:2], inputs.gates[1:2])
    assert_same(attend(backend, alone), whole[1:2], "output")


@every_backend
def test_all_active_with_gates_of_1_is_scaled_dot_product_attention(backend):
    inputs = make_inputs(is_causal=True)
    inputs.gates = torch.ones_like(inputs.gates)
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=True, enable_gqa=True
    )
    assert_same(attend(backend, inputs), expected.transpose(1, 2), "output")


@every_backend
@causal_or_not
@pytest.mark.parametrize("activity", ["all", "random"])
def test_dropout_keeps_the_mean_and_leaves_idle_heads_at_0(backend, activity, is_causal):
    inputs = make_inputs(B=1, Nq=6, D=2, activity=activity, is_causal=is_causal)
    expected = attend(backend, inputs).detach()
    with torch.no_grad():
        many = torch.stack([attend(backend, inputs, dropout_p=0.25) for _ in range(1500)])
    assert not torch.equal(many[0], many[1])
    assert (many[:, inputs.gates == 0] == 0).all()
    deviation = (many.mean(0) - expected).abs() / (many.std(0) / math.sqrt(1500) + 1e-6)
    assert deviation.max() < 5
