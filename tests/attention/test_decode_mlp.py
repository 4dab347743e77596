"""Promises of the operators for one new token outside attention: a norm, the MLP between two residuals, the output layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decode_layer_cases import to
from decode_mlp_cases import (
    ACTIVATIONS,
    CASES,
    TOLERANCE,
    arguments,
    assert_close,
    call,
    definition,
    inputs,
    normalised,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("sizes", CASES)
@torch.no_grad()
def test_output_is_that_of_the_definition_in_float32(isa, sizes, dtype):
    case = to(inputs(**sizes), dtype)
    exact = to(case, torch.float32)
    assert_close(call(case), definition(exact))
    assert_close(torch.ops.moh.cpu_decode_norm(case["x"], *case["norm"], *case["kind"]), normalised(exact["x"], exact))
    down = case["projections"][4]
    assert_close(
        torch.ops.moh.cpu_decode_linear(case["x"], down.t().contiguous(), None), exact["x"] @ exact["projections"][4]
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("where", ["norms around", "nothing before", "beside"])
@torch.no_grad()
def test_norms_stand_where_a_family_has_them(isa, where, dtype):
    case = to(inputs(B=2, C=37, M=19, offset=0.5, scale=0.7), dtype)
    exact = to(case, torch.float32)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(size, generator=generator).to(dtype) for size in (37, 37, (2, 1, 37))]
    added_norm, result_norm, beside = (tensor.float() for tensor in given)
    gate, up, down = exact["projections"][::2]

    def around(t: Tensor, weight: Tensor) -> Tensor:
        return normalised(t, exact | dict(norm=[weight, None])) if where != "beside" else t

    def mlp(t: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(t, gate)) * F.linear(t, up), down)

    y = exact["x"] + 0.7 * around(exact["added"], added_norm)
    z = {"norms around": normalised(y, exact), "nothing before": y, "beside": beside}[where]
    expected = y + 0.7 * around(mlp(z), result_norm)
    if where != "norms around":
        case["norm"] = [None, None]
    more = [None, None, None, *([given[2], None, None] if where == "beside" else [None, *given[:2]])]
    assert_close(torch.ops.moh.cpu_decode_mlp(*arguments(case), *more), expected)


@pytest.mark.parametrize(
    "message, norm, normalised",
    [
        ("normalised must be None where a norm_weight is given", torch.ones(48), torch.ones(1, 1, 48)),
        (r"normalised must have x's shape \[1, 1, 48\] and dtype Float, got \[1, 1, 47\]", None, torch.ones(1, 1, 47)),
        (r"normalised must have x's shape .* dtype Float, got .* and Half", None, torch.ones(1, 1, 48).half()),
    ],
    ids=["beside-a-norm", "shape", "dtype"],
)
@torch.no_grad()
def test_another_input_of_the_mlp_that_does_not_fit_is_refused(message, norm, normalised):
    case = inputs() | dict(norm=[norm, None])
    with pytest.raises(ValueError, match=message):
        torch.ops.moh.cpu_decode_mlp(*arguments(case), None, None, None, normalised)


@pytest.mark.parametrize("sizes", [dict(C=576, M=1536), dict(B=16, C=576, M=1536)], ids=["one-row", "sixteen-rows"])
@torch.no_grad()
def test_sixteen_bits_err_no_more_than_pytorch_does(kernels, sizes):
    case = to(inputs(**sizes), torch.bfloat16)
    exact = definition(to(case, torch.float32))
    error, of_pytorch = ((result.float() - exact).square().mean().sqrt() for result in (call(case), definition(case)))
    assert error <= of_pytorch


@torch.no_grad()
def test_activations_far_out_are_their_limits(isa):
    far = torch.tensor([-1e30, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 1e30])
    C = len(far)
    for activation, expected in ACTIVATIONS.items():
        # W_up is 0, so only its bias arrives; W_down is the identity
        case = inputs(C=C, M=C, gated=False, activation=activation) | dict(added=torch.zeros(1, 1, C))
        case["x"] = torch.zeros(1, 1, C)
        case["projections"] = [None, None, torch.zeros(C, C), far, torch.eye(C), None]
        torch.testing.assert_close(call(case)[0, 0], expected(far), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", [0, 1])
@torch.no_grad()
def test_a_nan_stays_in_its_row(isa, row):
    case = inputs(B=2)
    case["x"][row, 0, 5] = torch.nan
    bad = call(case).isnan()
    assert bad[row].all()
    assert not bad[1 - row].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_bits_depend_neither_on_threads_nor_on_other_rows(isa, threads, dtype):
    case = to(inputs(B=3, C=576, M=1536), dtype)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(call(case))
    assert all(torch.equal(result, results[0]) for result in results)
    for row in range(3):
        alone = case | dict(x=case["x"][row : row + 1], added=case["added"][row : row + 1])
        assert torch.equal(call(alone), results[0][row : row + 1])


@torch.no_grad()
def test_halves_of_one_matrix_and_transposed_weights_are_read_as_they_lie():
    case = inputs()
    gate, up, down = case["projections"][::2]
    expected = definition(case)
    halves = torch.cat([gate, up]).chunk(2)
    case["projections"][::2] = [*halves, down.t().contiguous().t()]
    assert_close(call(case), expected)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_operators_are_registered_correctly(gated):
    case = inputs(gated=gated, bias=True, centred=True)
    torch.library.opcheck(torch.ops.moh.cpu_decode_mlp.default, arguments(case))
    torch.library.opcheck(torch.ops.moh.cpu_decode_norm.default, (case["x"], *case["norm"], *case["kind"]))
    torch.library.opcheck(torch.ops.moh.cpu_decode_linear.default, (case["x"], *case["projections"][2:4]))


@pytest.mark.parametrize(
    "message, change",
    [
        (r"x must be \[B, 1, C\]", dict(x=torch.zeros(1, 2, 48))),
        ("added must have x's shape", dict(added=torch.zeros(2, 1, 48))),
        (r"the norm's weight must be \[C = 48\]", dict(norm=[torch.ones(47), None])),
        (r"the norm's bias must be \[C = 48\]", dict(norm=[torch.ones(48), torch.ones(48).half()])),
        (r"gate and up weights must be \[I, C = 48\]", dict(projections=0)),
        ("down's weight must have 2 dimensions and x's dtype", dict(projections=4)),
        ("activation must be 'silu', 'gelu_tanh' or 'gelu', got 'relu'", dict(activation="relu")),
    ],
    ids=["tokens", "added", "norm", "norm-bias", "weights", "dtype", "activation"],
)
def test_arguments_that_do_not_fit_are_refused(message, change):
    case = inputs()
    if change.get("projections") == 0:
        case["projections"][0] = case["projections"][0][1:]
    elif change.get("projections") == 4:
        case["projections"][4] = case["projections"][4].double()
    else:
        case |= change
    with pytest.raises(ValueError, match=message):
        call(case)
