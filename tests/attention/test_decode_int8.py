"""Promises of the operators for one new token with int8 weights: the definition with the weights that they stand for."""

from __future__ import annotations

import decode_layer_cases
import decode_mlp_cases
import pytest
import torch
from decode_layer_cases import to
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def rounded(projections: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Weights and biases: as integers, the scales of the weights alone, and the numbers that they stand for in float32."""
    integers, scales, exact = [], [], []
    for weight, bias in zip(projections[::2], projections[1::2], strict=True):
        if weight is None:
            integers += [None, None]
            exact += [None, None]
            scales.append(None)
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        quantised = (weight.float() / scale).round().to(torch.int8)
        integers += [quantised, bias]
        exact += [quantised.float() * scale, None if bias is None else bias.float()]
        scales.append(scale)
    return integers, scales, exact


def mlp(case, integers, scales) -> Tensor:
    return torch.ops.moh.cpu_decode_mlp(*decode_mlp_cases.arguments(case | dict(projections=integers)), *scales)


def layer(case, integers, scales) -> Tensor:
    c = case
    return torch.ops.moh.cpu_decode_layer(
        c["x"], c["gates"], *c["router"], *c["heads"], *integers, *c["angles"], *c["caches"], c["length"], c["mask"], 0.3,
        1, 1, c["threshold"], *scales,
    )  # fmt: skip


@each_dtype
@pytest.mark.parametrize("sizes", decode_mlp_cases.CASES)
@torch.no_grad()
def test_mlp_and_output_layer_are_the_definitions(isa, sizes, dtype):
    case = to(decode_mlp_cases.inputs(**sizes), dtype)
    integers, scales, exact = rounded(case["projections"])
    expected = to(case, torch.float32) | dict(projections=exact)
    decode_mlp_cases.assert_close(mlp(case, integers, scales), decode_mlp_cases.definition(expected))
    logits = torch.ops.moh.cpu_decode_linear(case["x"], integers[2], None, scales[1])
    decode_mlp_cases.assert_close(logits, expected["x"] @ exact[2].t())


@each_dtype
@pytest.mark.parametrize("sizes", decode_layer_cases.CASES)
@torch.no_grad()
def test_attention_layer_is_the_definitions(isa, sizes, dtype):
    # Gates are given because rounded predictions may be ranked differently
    case = to(decode_layer_cases.inputs(**sizes, router=False)[0], dtype)
    integers, scales, exact = rounded(case["projections"])
    expected = to(case, torch.float32) | dict(projections=exact)
    output, keys, _ = decode_layer_cases.definition(expected, None)
    decode_layer_cases.assert_close(layer(case, integers, scales), output)
    decode_layer_cases.assert_close(case["caches"][0][:, :, : case["length"] + 1], keys)


@torch.no_grad()
def test_rows_of_inactive_heads_are_not_read():
    case, _ = decode_layer_cases.inputs(router=False)
    case["gates"] = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]])
    integers, scales, _ = rounded(case["projections"])
    expected = layer(case, integers, scales)
    scales[0][:16] = torch.nan
    integers[6][:, :16] = 127
    assert torch.equal(layer(case, integers, scales), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_bits_depend_neither_on_threads_nor_on_other_rows(isa, threads, dtype):
    case = to(decode_mlp_cases.inputs(B=3, C=576, M=1536), dtype)
    integers, scales, _ = rounded(case["projections"])
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(mlp(case, integers, scales))
    assert all(torch.equal(result, results[0]) for result in results)
    alone = case | dict(x=case["x"][1:2], added=case["added"][1:2])
    assert torch.equal(mlp(alone, integers, scales), results[0][1:2])


@torch.no_grad()
def test_int8_and_float_weights_may_meet_in_one_call():
    case = decode_mlp_cases.inputs()
    integers, scales, exact = rounded(case["projections"])
    integers[:2], scales[0], exact[:2] = case["projections"][:2], None, case["projections"][:2]
    decode_mlp_cases.assert_close(
        mlp(case, integers, scales), decode_mlp_cases.definition(case | dict(projections=exact))
    )


def test_operators_are_registered_correctly():
    case = decode_mlp_cases.inputs(bias=True)
    integers, scales, _ = rounded(case["projections"])
    arguments = decode_mlp_cases.arguments(case | dict(projections=integers))
    torch.library.opcheck(torch.ops.moh.cpu_decode_mlp.default, (*arguments, *scales))
    torch.library.opcheck(torch.ops.moh.cpu_decode_linear.default, (case["x"], integers[2], None, scales[1]))


@pytest.mark.parametrize(
    "message, change",
    [
        (
            "the output layer's weight must have 2 dimensions and dtype int8 where a scale is given, got Float",
            dict(weight=torch.ones(8, 48)),
        ),
        (
            "the output layer's scale must be float32 with one number for each of the weight's 8 rows",
            dict(scale=torch.ones(7)),
        ),
        ("the output layer's scale must be float32", dict(scale=torch.ones(8).double())),
        ("the output layer's weight must have 2 dimensions and x's dtype", dict(scale=None)),
    ],
    ids=["float-weight", "scales", "scale-dtype", "no-scale"],
)
def test_arguments_that_do_not_fit_are_refused(message, change):
    given = dict(weight=torch.ones(8, 48, dtype=torch.int8), scale=torch.ones(8)) | change
    with pytest.raises(ValueError, match=message):
        torch.ops.moh.cpu_decode_linear(torch.ones(1, 1, 48), given["weight"], None, given["scale"])
