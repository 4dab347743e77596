"""Cases of the operators for one new token outside attention, as arguments by name, and what defines their results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES = [
    pytest.param(dict(), id="silu"),
    pytest.param(dict(activation="gelu_tanh"), id="gelu"),
    pytest.param(dict(gated=False, activation="gelu_tanh"), id="plain"),
    pytest.param(dict(gated=False, bias=True, centred=True), id="plain-layer-norm-biases"),
    pytest.param(dict(gated=False, activation="gelu"), id="plain-exact-gelu"),
    pytest.param(dict(B=3, bias=True, offset=1.0), id="batch-biases-offset"),
    pytest.param(dict(B=16, C=64, M=130, scale=0.22), id="sixteen-rows-scaled"),
    pytest.param(dict(B=2, C=37, M=19), id="odd-sizes"),
    pytest.param(dict(C=576, M=1536), id="as-large-as-SmolLM2"),
]


ACTIVATIONS = dict(silu=F.silu, gelu_tanh=lambda t: F.gelu(t, approximate="tanh"), gelu=F.gelu)


def inputs(
    B=1, C=48, M=80, gated=True, activation="silu", bias=False, centred=False, offset=0.0, scale=1.0
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(rows: int, columns: int) -> list[Tensor | None]:
        return [normal(rows, columns) / columns**0.5, normal(rows) if bias else None]

    return dict(
        x=normal(B, 1, C) + 0.3,
        added=normal(B, 1, C),
        scale=scale,
        norm=[1 + 0.3 * normal(C) - offset, normal(C) if centred else None],
        kind=(1e-5, offset, centred),
        projections=[*(linear(M, C) if gated else [None, None]), *linear(M, C), *linear(C, M)],
        activation=activation,
    )


def arguments(case) -> tuple[object, ...]:
    return (
        case["x"],
        case["added"],
        case["scale"],
        *case["norm"],
        *case["kind"],
        *case["projections"],
        case["activation"],
    )


def call(case) -> Tensor:
    return torch.ops.moh.cpu_decode_mlp(*arguments(case))


def normalised(x: Tensor, case) -> Tensor:
    weight, bias = case["norm"]
    eps, offset, centred = case["kind"]
    if centred:
        return F.layer_norm(x, x.shape[-1:], weight + offset, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight + offset, eps)


def definition(case) -> Tensor:
    gate, gate_bias, up, up_bias, down, down_bias = case["projections"]
    activate = ACTIVATIONS[case["activation"]]
    y = case["x"] + case["scale"] * case["added"]
    z = normalised(y, case)
    hidden = F.linear(z, up, up_bias)
    hidden = activate(hidden) if gate is None else activate(F.linear(z, gate, gate_bias)) * hidden
    return y + case["scale"] * F.linear(hidden, down, down_bias)


def assert_close(got: Tensor, expected: Tensor) -> None:
    allowed = TOLERANCE[got.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=allowed)
