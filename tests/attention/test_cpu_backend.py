"""Promises of the `cpu` backend alone: every instruction set, block and decoding path, threads, window, compiled graphs.

`test_attention_conformance.py` has what all backends share, `test_cpu_build.py` the build.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

import pytest
import torch
from attention_cases import ACTIVITIES, ISAS, MASKS, SPECIAL_MASKS, Inputs, assert_same, gradients, make_inputs
from covering import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moh.attention import choose_backend, cpu, moh_attention
from moh.attention.cpu.build import IMITATION, INSTRUCTION_SETS, BuildError, supported_instruction_sets
from moh.attention.testing import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = [  # the decoding path takes up to 16 rows (tokens x query heads) per key/value head
    pytest.param(dict(B=2, Hkv=2, G=4, Nq=3, Nk=1100, D=24), id="decode"),
    pytest.param(dict(B=2, Hkv=2, G=2, Nq=75, Nk=90, D=24), id="blocks"),
]
FULL_OR_CAUSAL = [pytest.param(False, id="full"), pytest.param(True, id="causal")]
causal_or_not = pytest.mark.parametrize("is_causal", FULL_OR_CAUSAL)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_path = pytest.mark.parametrize("shape", PATHS)


def attend(inputs: Inputs, *, window: int | None = None) -> Tensor:
    """The operator itself, which also takes a sliding window."""
    mask = None if inputs.attn_mask is None else inputs.attn_mask.detach()
    arguments = (inputs.q, inputs.k, inputs.v, inputs.gates, mask, inputs.is_causal, window, inputs.scale)
    out: Tensor = torch.ops.moh.cpu_attention(*arguments)[0]
    return out


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64, so that only the kernels' rounding differs and not the definition's."""

    def double(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_()

    q, k, v, gates = map(double, (inputs.q, inputs.k, inputs.v, inputs.gates))
    mask = double(inputs.attn_mask)
    return Inputs(q, k, v, gates, None if mask is None else mask.detach(), inputs.is_causal, inputs.scale)


def assert_close(got: Tensor, expected: Tensor, what: str, *, floor: float) -> None:
    """Equal to within 1e-5 (float32) or 2e-2 (16 bits) of the largest expected number, or of `floor` if larger."""
    assert got.isfinite().all(), f"{what}: not finite"
    if expected.numel():
        allowed = (1e-5 if got.dtype == torch.float32 else 2e-2) * max(expected.abs().max().item(), floor)
        error = (got.double() - expected).abs().max().item()
        assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"


def assert_like_definition(inputs: Inputs, *, window: int | None = None) -> None:
    """Values and gradients are those of the reference, computed in float64."""
    exact = in_float64(inputs)
    if window is not None:
        Nq, Nk = inputs.q.shape[2], inputs.k.shape[2]
        distance = torch.arange(Nq)[:, None] - torch.arange(Nk)
        exact.attn_mask, exact.is_causal = (distance >= 0) & (distance < window), False
    expected = moh_attention(exact.q, exact.k, exact.v, exact.gates, backend="reference", **exact.options)
    got = attend(inputs, window=window)
    assert got.shape == expected.shape and got.dtype == inputs.q.dtype
    assert_close(got, expected, "output", floor=0.1)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(inputs.q.dtype)
    inputs.attn_mask = None if inputs.attn_mask is None else inputs.attn_mask.detach()
    expected_grads = gradients(expected, exact, weight)
    for name, grad in gradients(got, inputs, weight).items():
        # Where a gradient cancels to 0 (one key), only rounding is left: that of products of output and gradient,
        # each as long as the values are wide, summed over the rows that see a key. It is largest with 16-bit output.
        H, Nq = inputs.q.shape[1:3]
        Hkv, Nk, Dv = inputs.v.shape[1:]
        size = math.sqrt(Dv * max(1.0, H // Hkv * Nq / max(Nk, 1)))
        floor = max(1.0, size / 4 if inputs.q.dtype == torch.float32 else size)
        assert_close(grad, expected_grads[name], f"gradient of {name}", floor=floor)


def test_every_instruction_set_of_this_machine_is_tested_here(kernels):
    assert set(cpu.instruction_sets()) <= {*INSTRUCTION_SETS, IMITATION, "portable"}
    assert cpu.instruction_sets()[-1] == "portable"
    built = [name for name in supported_instruction_sets() if name != "amx"]  # which Linux may refuse
    assert set(built) <= set(cpu.instruction_sets())


EVERY_ISA = [
    pytest.param(name, marks=[] if name in ISAS else pytest.mark.skip(reason=f"this processor has no {name}"))
    for name in INSTRUCTION_SETS
]


@pytest.mark.parametrize("isa", EVERY_ISA, indirect=True)
def test_the_requested_instruction_set_is_used(isa):
    assert cpu.instruction_set() == isa


def test_unknown_instruction_set_is_refused_by_name(kernels):
    with pytest.raises(ValueError, match=r"name must be one of .*'portable' on this machine, got 'avx1024'"):
        cpu.use_instruction_set("avx1024")


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, object]:
    """Any call of up to about 20 million multiplications: many short ones, some with long caches or wide heads."""
    kind: dict[str, object] = dict(
        Nq=draw(st.one_of(st.integers(1, 16), st.integers(17, 150))),
        Nk=draw(st.one_of(st.none(), st.integers(1, 140), st.integers(141, 1100))),
        D=draw(st.one_of(st.integers(1, 8).map(lambda n: 16 * n), st.integers(1, 256))),
    )
    kind["Dv"] = draw(st.one_of(st.none(), st.integers(1, 256)))
    one = kind["Nq"] * (kind["Nk"] or kind["Nq"]) * (kind["D"] + (kind["Dv"] or kind["D"]))
    for name, most in (("G", 8), ("Hkv", 3), ("B", 3)):
        kind[name] = draw(st.integers(1, max(1, min(most, 20_000_000 // one))))
        one *= kind[name]
    return kind | dict(
        activity=draw(st.sampled_from(ACTIVITIES)),
        mask=draw(st.sampled_from(MASKS)),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.2])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=40)
@given(kind=kinds())
def test_anything_is_like_the_definition(isa, kind):
    assert_like_definition(make_inputs(**kind))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, derandomize=False)
@given(kind=kinds())
def test_anything_is_like_the_definition_in_thousands_of_cases(isa, kind):
    assert_like_definition(make_inputs(**kind))


@covering(
    3,
    indirect=["isa"],
    isa=ISAS,
    dtype=DTYPES,
    is_causal=FULL_OR_CAUSAL,
    shape=[
        pytest.param(dict(Nq=1, Nk=1, D=1), id="one-of-everything"),
        pytest.param(dict(Nq=40, Nk=1), id="one-key"),
        pytest.param(dict(Nq=1, Nk=511), id="decode-511-keys"),
        pytest.param(dict(Nq=1, Nk=512), id="decode-512-keys"),
        pytest.param(dict(Nq=1, Nk=513), id="decode-513-keys"),
        pytest.param(dict(Nq=8, Nk=600), id="decode-16-rows"),
        pytest.param(dict(Nq=9, Nk=600), id="blocks-18-rows"),
        pytest.param(dict(Nq=150, Nk=129, D=17, Dv=33), id="no-multiple-of-anything"),
        pytest.param(dict(B=1, Hkv=1, Nq=130, D=256), id="D256"),
        pytest.param(dict(B=1, Hkv=1, Nq=4, Nk=70, D=255, Dv=1), id="D255-Dv1"),
        pytest.param(dict(B=1, Hkv=1, G=9, Nq=70, D=12), id="nine-query-heads-per-key-head"),
    ],
)
def test_shapes_at_the_edges_of_blocks_are_like_the_definition(isa, shape, is_causal, dtype):
    for activity in ("all", "random"):
        assert_like_definition(make_inputs(activity=activity, is_causal=is_causal, dtype=dtype, **shape))


@each_dtype
@each_path
@pytest.mark.parametrize("window", [1, 2, 7, 64, 65, 500, 2000])
def test_sliding_window_is_a_band_in_the_mask(isa, window, shape, dtype):
    inputs = make_inputs(is_causal=True, dtype=dtype, **shape)
    assert_like_definition(inputs, window=window)


@pytest.mark.parametrize("window", [1, 40, 130])
def test_sliding_window_over_many_tiles_of_keys_is_a_band_in_the_mask(isa, window):
    inputs = make_inputs(B=1, Hkv=1, G=2, Nq=400, is_causal=True, activity="uneven")
    assert_like_definition(inputs, window=window)


@pytest.mark.parametrize(
    "window, is_causal",
    [
        pytest.param(-1, True, id="negative"),
        pytest.param(0, True, id="empty"),
        pytest.param(3, False, id="not-causal"),
    ],
)
def test_window_without_meaning_is_refused(kernels, window, is_causal):
    with pytest.raises((ValueError, RuntimeError), match="window must be positive and needs is_causal"):
        attend(make_inputs(is_causal=is_causal), window=window)


@each_dtype
@each_path
@causal_or_not
def test_very_large_logits_do_not_overflow(isa, is_causal, shape, dtype):
    inputs = make_inputs(is_causal=is_causal, dtype=dtype, **shape)
    size = 250.0 if dtype == torch.float16 else 1e4
    inputs.q, inputs.k = (inputs.q.detach() * size).requires_grad_(), (inputs.k.detach() * size).requires_grad_()
    exact = in_float64(inputs)
    out = attend(inputs)
    expected = moh_attention(exact.q, exact.k, exact.v, exact.gates, backend="reference", **exact.options)
    assert_close(out, expected, "output", floor=0.1)
    assert all(grad.isfinite().all() for grad in gradients(out, inputs, torch.ones_like(out)).values())


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_kept_of_the_softmax_is_its_log_sum_exp_and_left_out_on_request(isa, shape, dtype):
    inputs = make_inputs(**shape, dtype=dtype)
    arguments = [x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.gates)]
    out, softmax = torch.ops.moh.cpu_attention(*arguments, None, False, None, None)
    bare, nothing = torch.ops.moh.cpu_attention(*arguments, None, False, None, None, keep_softmax=False)
    assert nothing.shape == (2, 0, *softmax.shape[2:]) and torch.equal(bare, out)
    q, k = arguments[0].float(), arguments[1].float().repeat_interleave(shape["G"], dim=1)
    scores = (q @ k.mT) / math.sqrt(shape["D"])
    expected = torch.where(inputs.gates.mT != 0, scores.logsumexp(-1) / math.log(2), math.inf)
    most, total = softmax
    idle = inputs.gates.mT == 0
    assert (most[idle] == math.inf).all() and (total[idle] == 0).all()
    rough = isa in ("avx512_bf16", "amx", "amx_imitated") and dtype == torch.bfloat16  # powers that are rounded to it
    tolerance = dict(rtol=0, atol=2e-4) if rough else dict(rtol=1.3e-6, atol=1e-5)
    torch.testing.assert_close(torch.where(idle, math.inf, most + total.log2()), expected, **tolerance)


@covering(
    3,
    kernel=["isa", "dtype", "shape"],
    indirect=["isa"],
    isa=ISAS,
    shape=PATHS,
    dtype=DTYPES,
    mask=SPECIAL_MASKS,
    is_causal=FULL_OR_CAUSAL,
)
def test_special_masks_are_read_by_the_rule_of_all_backends(isa, is_causal, mask, shape, dtype):
    inputs = make_inputs(is_causal=is_causal, mask=mask, dtype=dtype, **shape)
    inputs.attn_mask = inputs.attn_mask.detach()
    compare(attend, inputs)


@each_path
@causal_or_not
def test_nan_of_a_query_stays_in_its_row(isa, is_causal, shape):
    inputs = make_inputs(is_causal=is_causal, **shape)
    weight = torch.randn(*inputs.gates.shape, 24)
    clean = attend(inputs)
    clean_q = gradients(clean, inputs, weight)["q"]
    b, t, i = (inputs.gates != 0).nonzero()[5].tolist()
    inputs.q = inputs.q.detach().clone()
    inputs.q[b, i, t, 3] = math.nan
    inputs.q.requires_grad_()
    out = attend(inputs)
    grad_q = gradients(out, inputs, weight)["q"]
    assert out[b, t, i].isnan().all()
    others = torch.ones(inputs.gates.shape, dtype=torch.bool)
    others[b, t, i] = False
    assert torch.equal(out[others], clean[others])
    assert torch.equal(grad_q.transpose(1, 2)[others], clean_q.transpose(1, 2)[others])


@each_path
@pytest.mark.parametrize("how", ["bool", "additive"])
def test_query_that_may_see_no_key_gives_0_and_gradients_of_0(isa, how, shape):
    inputs = make_inputs(activity="all", **shape)
    seen = torch.rand(shape["Nq"], shape["Nk"]) < 0.5
    seen[1] = False
    inputs.attn_mask = seen if how == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    out = attend(inputs)
    assert (out[:, 1] == 0).all()
    assert (gradients(out, inputs, torch.ones_like(out))["q"][:, :, 1] == 0).all()
    assert_like_definition(inputs)


@each_path
@causal_or_not
def test_keys_hidden_by_padding_may_hold_anything_but_infinite_values(isa, is_causal, shape):
    inputs = make_inputs(activity="all", is_causal=is_causal, **shape)
    inputs.attn_mask = torch.ones(2, 1, 1, shape["Nk"], dtype=torch.bool)
    inputs.attn_mask[..., -3:] = inputs.attn_mask[1, ..., :2] = False
    clean = attend(inputs)
    inputs.k = inputs.k.detach().masked_fill(~inputs.attn_mask.mT, math.nan)
    assert torch.equal(attend(inputs), clean)


@each_dtype
@pytest.mark.parametrize("seen", [22, 23])
def test_keys_after_the_last_active_row_may_hold_anything(isa, seen, dtype):
    # With an odd number of keys, products of pairs of keys end in the middle of one.
    inputs = make_inputs(B=1, Hkv=2, G=1, Nq=40, Nk=40, D=16, dtype=dtype, is_causal=True)
    gates = inputs.gates.detach().clone()
    gates[:, :seen], gates[:, seen:] = 0.5, 0.0
    k, v = inputs.k.detach().clone(), inputs.v.detach().clone()

    def attended() -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, k, v, gates)]
        out = moh_attention(*leaves, is_causal=True, backend="cpu")
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    clean = attended()
    k[:, :, seen:], v[:, :, seen:] = math.nan, math.inf
    assert all(map(torch.equal, attended(), clean))


@each_dtype
@pytest.mark.parametrize("skipped", [0, 1], ids=["even-keys", "odd-keys"])
def test_keys_that_only_later_blocks_see_may_hold_anything(isa, skipped, dtype):
    # 32 rows are a whole number of blocks; with one row left out before them, a block ends at an odd key.
    seen = 32 + skipped
    q, k, v = (torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    gates = torch.ones(1, 64, 1, dtype=dtype)
    gates[:, 5] = 1.0 - skipped
    q.requires_grad_()
    clean = moh_attention(q, k, v, gates, is_causal=True, backend="cpu")
    (clean_grad,) = torch.autograd.grad(clean.sum(), q)
    k[:, :, seen:] = v[:, :, seen:] = math.nan
    got = moh_attention(q, k, v, gates, is_causal=True, backend="cpu")
    (grad,) = torch.autograd.grad(got.sum(), q)
    assert torch.equal(got[:, :seen], clean[:, :seen]) and got[:, seen:].isnan().all()
    assert torch.equal(grad[:, :, :seen], clean_grad[:, :, :seen]) and grad[:, :, seen:].isnan().all()


@each_dtype
@pytest.mark.parametrize("Nq", [17, 18])
def test_a_key_of_minus_infinity_gets_gradients_of_0(isa, Nq, dtype):
    q, k, v = (torch.randn(1, 1, n, 16).to(dtype) for n in (Nq, 40, 40))
    q[..., 0], k[0, 0, 5, 0] = 1.0, -math.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = moh_attention(*leaves, torch.ones(1, Nq, 1, dtype=dtype), backend="cpu")
    _, grad_k, grad_v = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all()
    assert (grad_k[0, 0, 5] == 0).all() and (grad_v[0, 0, 5] == 0).all()


@covering(
    3,
    indirect=["isa"],
    isa=ISAS,
    of=["q", "k", "v"],
    apart=[pytest.param(0, id="even-rows"), pytest.param(1, id="odd-rows")],
    widths=[(1, 1), (2, 2), (7, 7), (30, 30), (33, 33), (16, 7), (7, 16)],
)
def test_bfloat16_of_any_width_and_distance_of_rows_is_like_the_definition(isa, of, apart, widths):
    width, value_width = widths
    inputs = make_inputs(B=2, Hkv=2, G=2, Nq=45, Nk=51, D=width, Dv=value_width, dtype=torch.bfloat16)
    x = getattr(inputs, of).detach()
    width = x.shape[-1]
    rows = torch.zeros(*x.shape[:-1], width + width % 2 + apart, dtype=x.dtype)
    rows[..., :width] = x
    setattr(inputs, of, rows[..., :width].requires_grad_())
    assert_like_definition(inputs)


@each_dtype
@each_path
def test_small_gates_get_exact_gradients(isa, shape, dtype):
    inputs = make_inputs(activity="all", dtype=dtype, **shape)
    inputs.gates = (torch.rand(inputs.gates.shape) * 1e-5).to(dtype).requires_grad_()
    assert_like_definition(inputs)


@each_path
@causal_or_not
def test_non_contiguous_inputs_are_served_as_they_are(isa, is_causal, shape):
    inputs = make_inputs(is_causal=is_causal, mask="bool_full", **shape)
    expected = attend(inputs)
    inputs.q = inputs.q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    inputs.k = torch.cat([inputs.k.detach()] * 2, dim=2)[:, :, : shape["Nk"]].requires_grad_()
    inputs.v = inputs.v.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    inputs.gates = inputs.gates.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    inputs.attn_mask = inputs.attn_mask.mT.contiguous().mT
    assert torch.equal(attend(inputs), expected)
    assert_like_definition(inputs)


@causal_or_not
@pytest.mark.parametrize("apart", [pytest.param(1024, id="pages"), pytest.param(3600, id="over-4-MiB")])
def test_keys_and_values_far_apart_in_memory_give_the_same_bits(isa, is_causal, apart):
    inputs = make_inputs(B=1, Hkv=2, G=1, Nq=300, D=24, activity="all", is_causal=is_causal)
    weight = torch.randn(1, 300, 2, 24)
    out = attend(inputs)
    expected = {"output": out, **gradients(out, inputs, weight)}

    def spread(x: Tensor) -> Tensor:
        row = torch.zeros(1, 300, apart)[..., : 2 * 24].unflatten(-1, (2, 24)).transpose(1, 2)
        return row.copy_(x.detach()).requires_grad_()

    inputs.k, inputs.v = spread(inputs.k), spread(inputs.v)
    assert inputs.k.stride(2) == apart
    out = attend(inputs)
    for name, tensor in {"output": out, **gradients(out, inputs, weight)}.items():
        assert torch.equal(tensor, expected[name]), name


@each_path
def test_inputs_are_left_as_they_were(isa, shape):
    inputs = make_inputs(mask="bias_per_head", is_causal=True, **shape)
    copies = [t.detach().clone() for t in inputs.tensors.values()]
    attend(inputs).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs.tensors.values(), copies, strict=True))


THREADED = [
    pytest.param(dict(B=2, Hkv=2, G=4, Nq=1, Nk=2100, D=40, activity="random"), id="decode"),
    pytest.param(dict(B=1, Hkv=1, G=3, Nq=5, Nk=1500, D=64, mask="padding"), id="decode-few-heads"),
    pytest.param(dict(B=2, Hkv=8, G=2, Nq=1, Nk=1100, D=72, activity="random"), id="decode-many-heads"),
    pytest.param(dict(B=2, Hkv=2, G=4, Nq=150, D=40, activity="uneven", is_causal=True), id="causal-gqa"),
    pytest.param(dict(B=3, Hkv=6, G=1, Nq=100, Nk=300, D=16), id="many-heads"),
    pytest.param(dict(B=1, Hkv=1, G=9, Nq=120, D=24, mask="bool_2d"), id="one-key-head"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", THREADED)
def test_any_number_of_threads_gives_the_same_bits(isa, threads, kind, dtype):
    inputs = make_inputs(dtype=dtype, **kind)
    inputs.attn_mask = None if inputs.attn_mask is None else inputs.attn_mask.detach()
    results = {}
    for count in (1, 2, 3, 4, 8):
        threads(count)
        out = attend(inputs)
        weight = torch.ones_like(out).cumsum(1) / out.shape[1]
        results[count] = {"output": out, **gradients(out, inputs, weight)}
    for count, result in results.items():
        for name, tensor in result.items():
            assert torch.equal(tensor, results[1][name]), f"{name} with {count} threads"


@torch.no_grad()
def test_rows_do_not_depend_on_the_keys_that_follow_them(isa, threads):
    # Blocks of rows end after 63 keys, an odd number; together with later ones they use tiles that hold more
    threads(1)
    inputs = make_inputs(B=8, Hkv=8, G=1, Nq=95, D=64, dtype=torch.bfloat16, is_causal=True)
    q, k, v, gates = (t.detach() for t in inputs.tensors.values())
    gates = torch.ones_like(gates).index_fill_(1, torch.arange(31), 0.0)  # the first 32 active rows are tokens 31 to 62
    together = moh_attention(q, k, v, gates, is_causal=True, backend="cpu")
    alone = moh_attention(q[:, :, :63], k[:, :, :63], v[:, :, :63], gates[:, :63], is_causal=True, backend="cpu")
    assert torch.equal(alone, together[:, :63])


@pytest.mark.parametrize("window", [3, 70])
def test_any_number_of_threads_gives_the_same_bits_with_a_window(isa, threads, window):
    inputs = make_inputs(B=1, Hkv=2, G=4, Nq=300, is_causal=True)
    results = []
    for count in (1, 2, 3, 4, 8):
        threads(count)
        out = attend(inputs, window=window)
        results.append((out, *gradients(out, inputs, torch.ones_like(out)).values()))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    "change, reason",
    [
        pytest.param(dict(dtype=torch.float64), "it computes float32, bfloat16 and float16, not float64", id="float64"),
        pytest.param(dict(D=257), "it supports heads of width up to 256, not 257", id="wide"),
        pytest.param(dict(Dv=300), "it supports heads of width up to 256, not 300", id="wide-values"),
        pytest.param(dict(dropout_p=0.1), "it has no dropout of attention weights", id="dropout"),
        pytest.param(dict(mask="bias_per_head"), "it has no gradient for the mask", id="learned-mask"),
    ],
)
def test_call_that_it_cannot_serve_goes_to_sdpa_and_is_refused_by_name_with_the_reason(kernels, change, reason):
    change = dict(change)
    dropout_p = change.pop("dropout_p", 0.0)
    inputs = make_inputs(**change)
    arguments = (inputs.q, inputs.k, inputs.v, inputs.gates)
    options = dict(attn_mask=inputs.attn_mask, dropout_p=dropout_p)
    assert choose_backend(inputs.call._replace(dropout_p=dropout_p)).name == "sdpa"
    with pytest.raises(ValueError, match=f"backend 'cpu' can't handle this call: {reason}"):
        moh_attention(*arguments, backend="cpu", **options)


def test_additive_mask_that_needs_no_gradient_is_served(kernels):
    inputs = make_inputs(mask="bias_per_head")
    with torch.no_grad():
        assert choose_backend(inputs.call).name == "cpu"
    inputs.attn_mask = inputs.attn_mask.detach()
    assert choose_backend(inputs.call).name == "cpu"


def test_operator_refuses_what_does_not_fit_together(kernels):
    inputs = make_inputs()
    arguments = [inputs.q, inputs.k, inputs.v, inputs.gates, None, False, None, None]
    for index, wrong, message in (
        (0, inputs.q[0], "4 dimensions"),
        (1, inputs.k[:, :, :-1], "matching shapes"),
        (2, inputs.v.bfloat16(), "one dtype"),
        (3, inputs.gates.mT, "matching shapes"),
        (4, torch.ones(5, 5).long(), "attn_mask must be bool or of q's dtype"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.moh.cpu_attention(*arguments[:index], wrong, *arguments[index + 1 :])


def test_second_derivative_is_refused_not_wrong(kernels):
    inputs = make_inputs()
    (grad,) = torch.autograd.grad(attend(inputs).square().sum(), inputs.q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(grad.square().sum(), inputs.k)


OP_CASES = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(is_causal=True, Nq=40), id="causal-blocks"),
    pytest.param(dict(is_causal=True, Nq=40, window=3), id="window"),
    pytest.param(dict(mask="padding", scale=0.3, Nk=7), id="padding-own-scale"),
    pytest.param(dict(mask="bias_per_head", Dv=5), id="bias-narrow-values"),
    pytest.param(dict(activity="all", dtype=torch.bfloat16), id="all-active-bfloat16"),
    pytest.param(dict(activity="none"), id="nothing-active"),
    pytest.param(dict(Nq=1, Nk=600), id="decode"),
]


@pytest.mark.parametrize("kind", OP_CASES)
def test_operator_is_registered_correctly(kernels, kind):
    kind = dict(kind)
    window = kind.pop("window", None)
    inputs = make_inputs(**kind)
    mask = None if inputs.attn_mask is None else inputs.attn_mask.detach()
    arguments = (inputs.q, inputs.k, inputs.v, inputs.gates, mask, inputs.is_causal, window, inputs.scale)
    torch.library.opcheck(torch.ops.moh.cpu_attention.default, arguments, atol=1e-5, rtol=1e-5)
    bare = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.moh.cpu_attention.default, bare, {"keep_softmax": False}, test_utils=utilities, atol=1e-5, rtol=1e-5
    )


def test_backward_operator_refuses_an_output_and_a_softmax_of_another_call(kernels):
    inputs = make_inputs()
    arguments = [x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.gates)]
    out, softmax = torch.ops.moh.cpu_attention(*arguments, None, False, None, None, keep_softmax=False)
    with pytest.raises(ValueError, match="keep_softmax=True"):
        torch.ops.moh.cpu_attention_backward(out, *arguments, None, out, softmax, False, None, None)
    out, softmax = torch.ops.moh.cpu_attention(*arguments, None, False, None, None)
    with pytest.raises(ValueError, match="grad and out"):
        torch.ops.moh.cpu_attention_backward(out[:, 1:], *arguments, None, out, softmax, False, None, None)


def assert_compiled_equals_eager(compiled: Callable[..., Tensor], inputs: Inputs) -> None:
    inputs.attn_mask = None if inputs.attn_mask is None else inputs.attn_mask.detach()
    arguments, options = (inputs.q, inputs.k, inputs.v, inputs.gates), dict(backend="cpu", **inputs.options)
    got, expected = compiled(*arguments, **options), moh_attention(*arguments, **options)
    assert_same(got, expected, "output")
    weight = torch.randn_like(expected)
    expected_grads = gradients(expected, inputs, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


def test_compiled_attention_is_one_graph_and_equals_eager(kernels):
    torch.compiler.reset()
    compiled = torch.compile(moh_attention, backend="aot_eager", fullgraph=True)
    for kind in (
        dict(),
        dict(is_causal=True),
        dict(mask="padding"),
        dict(mask="bias_per_head"),
        dict(activity="none"),
        dict(Nq=70, activity="uneven"),
        dict(dtype=torch.bfloat16, scale=0.3),
    ):
        assert_compiled_equals_eager(compiled, make_inputs(**kind))


def test_compiled_attention_is_used_by_default_and_without_gradients(kernels):
    torch.compiler.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    inputs = make_inputs(Nq=1, Nk=9)
    with torch.no_grad():
        got = torch.compile(moh_attention, backend=keep, fullgraph=True)(inputs.q, inputs.k, inputs.v, inputs.gates)
    assert torch.equal(got, attend(inputs))
    assert [node.target for graph in graphs for node in graph.graph.nodes].count(torch.ops.moh.cpu_attention) == 1


def test_one_compiled_graph_handles_all_lengths(kernels):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moh_attention, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for N, Nk in ((5, 7), (70, 90), (33, 21), (6, 800)):
        assert_compiled_equals_eager(compiled, make_inputs(Nq=N, Nk=Nk, mask="padding"))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), reason="there is no C++ compiler"
)
def test_inductor_compiles_forward_and_backward_into_one_graph(kernels):
    torch.compiler.reset()
    inputs = make_inputs(is_causal=True)

    def around(q, k, v, gates):
        return moh_attention(q * 2, k, v, gates.sin(), is_causal=True, backend="cpu").cos()

    got = torch.compile(around, fullgraph=True)(inputs.q, inputs.k, inputs.v, inputs.gates)
    expected = around(inputs.q, inputs.k, inputs.v, inputs.gates)
    assert_same(got, expected, "output")
    weight = torch.randn_like(expected)
    expected_grads = gradients(expected, inputs, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


def test_instruction_sets_without_kernels_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu.backend, "_state", {"reason": "no compiler"})
    for call in (cpu.instruction_sets, lambda: cpu.use_instruction_set("portable")):
        with pytest.raises(BuildError, match="no compiler"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("Nq, Dv", [(4, 64), (40, 64), (40, 63)])
def test_weights_of_huge_scores_stay_weights_in_the_backward_pass(isa, Nq, Dv, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, Nq, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, Dv)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q * 1e5, k * 1e5, v))
    gates = torch.ones(1, Nq, 1, dtype=dtype, requires_grad=True)
    out = moh_attention(q, k, v, gates, backend="cpu")
    grads = torch.autograd.grad(out.sum(), (q, k, v, gates))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[2].min() >= 0 and grads[2].max() <= Nq  # the weights that all queries give a key
    if Nq > 16:  # with fewer, the forward pass sums scores in a different order from the backward pass
        torch.testing.assert_close(grads[2].sum(2), torch.full_like(v[:, :, 0], Nq))


@pytest.mark.parametrize("Nq", [1, 40])
def test_a_row_masked_with_the_lowest_number_averages_as_in_the_reference(kernels, Nq):
    q, k, v = torch.randn(1, 2, Nq, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    mask = torch.full((1, 1, Nq, 50), torch.finfo(torch.float32).min)
    gates = torch.ones(1, Nq, 2)
    out = moh_attention(q, k, v, gates, attn_mask=mask, backend="cpu")
    expected = moh_attention(q, k, v, gates, attn_mask=mask, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
