"""Promises of aggregated attention: all backends give the definition's values and gradients, for any share of heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm", reason="the vision extra is not installed")

from transnext_cases import assert_close

from moh.attention import cpu
from moh.models.timm.transnext.aggregated import Scoring, aggregated_attention, neighbours

SHAPES = [
    pytest.param(dict(B=2, size=(4, 4), H=4, D=8, P=4, window=3), id="B2-4x4-H4-D8-P4"),
    pytest.param(dict(B=1, size=(14, 14), H=4, D=24, P=49, window=3), id="B1-14x14-H4-D24-P49"),
    pytest.param(dict(B=3, size=(2, 6), H=3, D=6, P=3, window=3), id="image-narrower-than-two-windows"),
    pytest.param(dict(B=2, size=(1, 1), H=2, D=5, P=1, window=3), id="one-token"),
    pytest.param(dict(B=1, size=(6, 5), H=2, D=33, P=17, window=5), id="window-5-odd-sizes"),
    pytest.param(dict(B=2, size=(3, 3), H=4, D=8, P=9, window=1), id="window-1"),
    pytest.param(dict(B=2, size=(7, 7), H=8, D=24, P=49, window=0), id="no-window-7x7-H8-D24"),
    pytest.param(dict(B=1, size=(30, 20), H=2, D=8, P=6, window=3), id="more-than-one-task-of-rows"),
]
SHARES = [pytest.param(s, id=f"share-{s}") for s in (1.0, 0.5, 0.0)]
BACKENDS = ["cpu", "sdpa"]


def case(B: int, size: tuple[int, int], H: int, D: int, P: int, window: int, share: float = 0.5, dtype=torch.float32):
    """Inputs and parameters of one call; if share < 1, the first token has no head and no token has the last head."""
    torch.manual_seed(0)
    N, W = size[0] * size[1], window**2
    gates = torch.rand(B, N, H) + 0.5
    if share < 1:
        gates = gates * (torch.rand(B, N, H) < share)
        gates[:, 0] = 0
        gates[..., -1] = 0
    near = N if window else 0
    inputs = [
        torch.randn(B, N, H, D),
        F.normalize(torch.randn(B, near, H, D), dim=-1),
        torch.randn(B, near, H, D),
        F.normalize(torch.randn(B, P, H, D), dim=-1),
        torch.randn(B, P, H, D),
        gates,
    ]
    scoring = dict(
        embedding=torch.randn(H, D),
        temperature=torch.rand(H) * 3,
        length=torch.rand(N) + 1,
        pooled_bias=torch.randn(H, N, P),
        tokens=torch.randn(H, D, W),
        token_bias=torch.randn(H, W),
        local_bias=torch.randn(H, W),
    )
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    scoring = {name: x.to(dtype).requires_grad_(name != "length") for name, x in scoring.items()}
    return inputs, Scoring(size=size, **scoring)


def leaves(inputs: list[torch.Tensor], scoring: Scoring) -> list[torch.Tensor]:
    parameters = [getattr(scoring, field.name) for field in dataclasses.fields(scoring) if field.name != "size"]
    return [*inputs, *(x for x in parameters if x.requires_grad)]


def run(inputs: list[torch.Tensor], scoring: Scoring, backend: str, **options: Any) -> list[torch.Tensor]:
    """Output, and gradients of all inputs."""
    out = aggregated_attention(*inputs, scoring, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves(inputs, scoring), weight, materialize_grads=True)]


def needs(backend: str) -> None:
    if backend == "cpu" and (reason := cpu.unavailable()) is not None:
        pytest.skip(reason)


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], forward: float, gradient: float) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.isfinite(a).all()
        allowed = (gradient if i else forward) * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=allowed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_the_definitions(shape, share, backend):
    needs(backend)
    inputs, scoring = case(**shape, share=share)
    assert_same(run(inputs, scoring, backend), run(inputs, scoring, "reference"), 1e-5, 1e-5)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_gives_the_same(isa):
    needs("cpu")
    if isa not in cpu.instruction_sets():
        pytest.skip(f"this machine's build has no {isa}")
    before = cpu.instruction_set()
    cpu.use_instruction_set(isa)
    try:
        for shape in SHAPES:
            inputs, scoring = case(**shape.values[0])
            assert_same(run(inputs, scoring, "cpu"), run(inputs, scoring, "reference"), 1e-5, 1e-5)
    finally:
        cpu.use_instruction_set(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=["bfloat16", "float16"]
)
def test_low_precision_inputs(dtype, tolerance, backend):
    needs(backend)
    inputs, scoring = case(B=2, size=(6, 6), H=4, D=8, P=9, window=3, dtype=dtype)
    wide, wide_scoring = case(B=2, size=(6, 6), H=4, D=8, P=9, window=3, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in wide]
    fields = {f.name: getattr(wide_scoring, f.name) for f in dataclasses.fields(wide_scoring)}
    fields = {
        name: x.detach().float().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in fields.items()
    }
    expected = run(wide, Scoring(**fields), "reference")
    for got, exact in zip(run(inputs, scoring, backend), expected, strict=True):
        assert got.dtype == dtype
        assert (got.float() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_are_the_numerical_ones(backend):
    inputs, scoring = case(B=1, size=(2, 3), H=2, D=3, P=2, window=3, share=1.0, dtype=torch.float64)
    names = [f.name for f in dataclasses.fields(scoring) if f.name not in ("size", "length")]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, tensors[6:], strict=True))
        changed = dataclasses.replace(scoring, **parameters)
        return aggregated_attention(*tensors[:6], changed, backend=backend)

    assert torch.autograd.gradcheck(function, (*inputs, *(getattr(scoring, name) for name in names)))


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
def test_inactive_pairs_get_neither_output_nor_gradient(backend):
    needs(backend)
    inputs, scoring = case(B=2, size=(4, 4), H=4, D=8, P=4, window=3)
    out, grad_q, *rest = run(inputs, scoring, backend)
    inactive = inputs[5] == 0
    assert 0 < inactive.sum() < inactive.numel()
    grad_gates = rest[4]
    assert not out[inactive].any() and not grad_q[inactive].any() and not grad_gates[inactive].any()
    assert grad_gates[~inactive].all()
    grad_k, grad_v = rest[0], rest[1]
    assert not grad_k[..., -1, :].any() and not grad_v[..., -1, :].any()  # the unused head


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_of_zero_has_finite_gradients(backend):
    needs(backend)
    inputs, scoring = case(B=1, size=(3, 3), H=2, D=8, P=4, window=3, share=1.0)
    with torch.no_grad():
        inputs[0][0, 4] = 0
    got, expected = run(inputs, scoring, backend), run(inputs, scoring, "reference")
    assert_close(got[0], expected[0], 1e-5)
    assert torch.isfinite(got[1]).all()


def test_results_do_not_depend_on_the_number_of_threads():
    needs("cpu")
    inputs, scoring = case(B=3, size=(8, 8), H=3, D=8, P=16, window=3)
    one = run(inputs, scoring, "cpu")
    torch.set_num_threads(2)
    try:
        two = run(inputs, scoring, "cpu")
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, two))


def test_operator_passes_pytorchs_own_checks():
    needs("cpu")
    inputs, s = case(B=1, size=(3, 4), H=2, D=4, P=2, window=3)
    tensors = (*inputs, s.embedding, s.temperature, s.length, s.tokens, s.token_bias, s.local_bias, s.pooled_bias)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.moh.cpu_aggregated_attention.default, (*tensors, 3, 4), test_utils=checks)


def test_second_derivative_is_refused_with_the_way_out():
    needs("cpu")
    inputs, scoring = case(B=1, size=(3, 3), H=2, D=4, P=2, window=3)
    out = aggregated_attention(*inputs, scoring, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict(), dict(backend="gpu"), "backend must be None or one of 'cpu', 'sdpa', 'reference', got 'gpu'"),
        (dict(), dict(backend="cpu", dropout_p=0.1), "backend 'cpu' can't handle this call: it has no dropout"),
        (
            dict(),
            dict(backend="reference", dropout_p=0.1),
            "backend 'reference' can't handle this call: it has no drop",
        ),
        (dict(dtype=torch.float64), dict(backend="cpu"), "it computes float32, bfloat16 and float16, not float64"),
        (dict(window=9), dict(backend="cpu"), "it supports local windows up to 7 x 7, not 9"),
    ],
    ids=["unknown", "cpu-dropout", "reference-dropout", "float64", "large-window"],
)
def test_a_backend_that_can_not_serve_says_why(change, options, message):
    inputs, scoring = case(**dict(B=1, size=(3, 3), H=2, D=4, P=2, window=3) | change)
    with pytest.raises(ValueError, match=message):
        aggregated_attention(*inputs, scoring, **options)


@pytest.mark.parametrize("change", [dict(dtype=torch.float64), dict(window=9)], ids=["float64", "large-window"])
def test_what_the_operator_has_not_pytorch_computes(change):
    inputs, scoring = case(**dict(B=1, size=(3, 3), H=2, D=4, P=2, window=3) | change)
    got = aggregated_attention(*inputs, scoring)
    assert torch.allclose(got, aggregated_attention(*inputs, scoring, backend="reference"), atol=1e-5)


@torch.no_grad()
def test_dropout_keeps_the_mean():
    inputs, scoring = case(B=1, size=(2, 2), H=2, D=4, P=2, window=3, share=1.0)
    expected = aggregated_attention(*inputs, scoring)[0]
    many = aggregated_attention(*(x.expand(2000, *x.shape[1:]) for x in inputs), scoring, dropout_p=0.5)
    assert many.std(0).min() > 0
    assert (many.mean(0) - expected).abs().max() < 0.25 * expected.abs().max()


def test_neighbours_are_the_window_around_each_token():
    index, visible = neighbours((2, 3), 3, torch.device("cpu"))
    assert index[4][visible[4]].tolist() == [0, 1, 2, 3, 4, 5]  # the middle of the last row
    assert visible[4].tolist() == [True] * 6 + [False] * 3
    assert index[0][visible[0]].tolist() == [0, 1, 3, 4]
