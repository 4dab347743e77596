"""Promises of the projections of active heads: values and gradients of the dense product, and when they are used."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ISAS
from covering import covering
from torch import nn
from torch.utils.checkpoint import checkpoint

import moh
from moh.attention import projections

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = [
    pytest.param(dict(T=70, C=40, H=4, D=16), id="T70-C40-H4-D16"),
    pytest.param(dict(T=500, C=300, H=3, D=24), id="more-than-one-block-of-tokens-and-channels"),
    pytest.param(dict(T=70, C=96, H=2, D=64), id="whole-panels"),
    pytest.param(dict(T=5, C=3, H=2, D=1), id="tiny"),
    pytest.param(dict(T=9, C=17, H=1, D=33), id="odd"),
    pytest.param(dict(T=0, C=8, H=2, D=4), id="no-tokens"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def case(T: int, C: int, H: int, D: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    x, heads, matrix = torch.randn(T, C), torch.randn(T, H, D), torch.randn(H * D, C) / C**0.5
    gates = torch.rand(T, H) * (torch.rand(T, H) < 0.6)
    if T:
        gates[0] = 0  # a token without an active head
    return (*(t.to(dtype).requires_grad_() for t in (x, heads, matrix)), gates.to(dtype))


def assert_close(got, expected, dtype):
    allowed = TOLERANCE[dtype] * max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


@covering(3, indirect=["isa"], isa=ISAS, dtype=TOLERANCE, size=SIZES, layout=["rows", "columns", "gaps", "steps"])
def test_products_and_gradients_are_the_dense_ones_of_active_pairs(isa, size, layout, dtype):
    x, heads, matrix, gates = case(**size, dtype=dtype)
    if layout == "columns":  # the memory layout of a transposed output projection
        matrix = matrix.detach().t().contiguous().t().requires_grad_()
    if layout in ("gaps", "steps"):  # rows an odd distance apart; every second number
        H_D, C = matrix.shape
        wide = torch.zeros(H_D, C + C % 2 + 1) if layout == "gaps" else torch.zeros(H_D, 2 * C)
        part = wide.to(dtype)[:, :C] if layout == "gaps" else wide.to(dtype)[:, ::2]
        matrix = part.copy_(matrix.detach()).requires_grad_()
    active = (gates != 0)[..., None]
    dense = (x @ matrix.t()).view(heads.shape) * active
    expanded = torch.ops.moh.cpu_expand(x, matrix, gates)
    assert_close(expanded, dense, dtype)
    weight = torch.randn_like(dense)
    for got, expected in zip(
        torch.autograd.grad(expanded, (x, matrix), weight), torch.autograd.grad(dense, (x, matrix), weight), strict=True
    ):
        assert_close(got, expected, dtype)

    dense = (heads * active).flatten(1) @ matrix
    summed = torch.ops.moh.cpu_sum_heads(heads, matrix, gates)
    assert_close(summed, dense, dtype)
    weight = torch.randn_like(dense)
    for got, expected in zip(
        torch.autograd.grad(summed, (heads, matrix), weight),
        torch.autograd.grad(dense, (heads, matrix), weight),
        strict=True,
    ):
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(dict(T=500, C=300, H=3, D=24), id="tasks-by-tokens"),
        pytest.param(dict(T=150, C=200, H=3, D=64), id="tasks-by-channels-and-halves-of-heads"),
    ],
)
def test_bits_do_not_depend_on_the_number_of_threads(isa, threads, size, dtype):
    x, heads, matrix, gates = (t.detach() for t in case(**size, dtype=dtype))
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(
            (
                torch.ops.moh.cpu_expand(x, matrix, gates),
                torch.ops.moh.cpu_sum_heads(heads, matrix, gates),
                torch.ops.moh.cpu_outer(heads, x, gates),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("operator", ["cpu_expand", "cpu_sum_heads"])
def test_operators_are_registered_correctly(operator):
    x, heads, matrix, gates = case(T=20, C=12, H=2, D=8)
    source = x if operator == "cpu_expand" else heads
    torch.library.opcheck(getattr(torch.ops.moh, operator).default, (source, matrix, gates), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "message, call",
    [
        ("multiple of 3 rows, got 8", lambda x, h, m: torch.ops.moh.cpu_expand(x, m, torch.ones(5, 3))),
        ("x must be .*C = 6", lambda x, h, m: torch.ops.moh.cpu_expand(x[:, :4], m, torch.ones(5, 2))),
        ("same number of tokens", lambda x, h, m: torch.ops.moh.cpu_expand(x[:4], m, torch.ones(5, 2))),
        ("heads must be", lambda x, h, m: torch.ops.moh.cpu_sum_heads(h[..., :3], m, torch.ones(5, 2))),
        (
            "float32, bfloat16 or float16",
            lambda x, h, m: torch.ops.moh.cpu_expand(x.double(), m.double(), torch.ones(5, 2)),
        ),
    ],
    ids=["rows", "channels", "tokens", "heads", "dtype"],
)
def test_shapes_that_do_not_fit_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 6), torch.randn(5, 2, 4), torch.randn(8, 6))


@pytest.fixture
def sparse_calls(monkeypatch, kernels):
    """Names of the sparse products that were called, those of backward passes included."""
    calls = []
    for name in ("cpu_expand", "cpu_sum_heads"):
        operator = getattr(torch.ops.moh, name)
        monkeypatch.setattr(
            torch.ops.moh, name, lambda *a, name=name, operator=operator: calls.append(name) or operator(*a)
        )
    return calls


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("router", ["linear", "two_stage", "query_norm"])
def test_layer_with_half_the_heads_projects_them_alone_and_gives_the_same(sparse_calls, monkeypatch, router, bias):
    torch.manual_seed(0)
    layer = moh.MoHAttention(
        64, num_heads=8, shared_heads=2, active_heads=2, router=router, num_kv_heads=4, qkv_bias=bias, proj_bias=bias
    )
    x = torch.randn(2, 50, 64, requires_grad=True)
    sparse = layer(x, is_causal=True)
    assert sparse_calls == (["cpu_sum_heads"] if router == "query_norm" else ["cpu_expand", "cpu_sum_heads"])
    weight = torch.randn_like(sparse)
    inputs = [x, *layer.parameters()]
    sparse_grads = torch.autograd.grad(sparse, inputs, weight)
    monkeypatch.setattr(projections, "_max_share", lambda *_, **__: 0.0)
    dense = layer(x, is_causal=True)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    for got, expected in zip(sparse_grads, torch.autograd.grad(dense, inputs, weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_fused_projection_gives_the_dense_queries_keys_and_values(sparse_calls, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 3 * 48, bias=bias), torch.randn(2, 50, 64, requires_grad=True)
    gates = (torch.rand(2, 50, 6) < 0.5).float()
    inputs = [x, *linear.parameters()]
    results = []
    for share in (0.5, 1.0):
        q, k, v = moh.attention.project_qkv(linear, x, gates, share)
        assert q.shape == k.shape == v.shape == (2, 50, 6, 8)
        q = q * gates[..., None]  # the query of an inactive head does not matter
        results.append([q, k, v, *torch.autograd.grad((q * 2 + k * 3 + v * v).sin().sum(), inputs)])
    assert sparse_calls.count("cpu_expand") == 1  # the second share is too large
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    expected = linear(x).view(2, 50, 3, 6, 8)
    torch.testing.assert_close(torch.stack(results[1][1:3], 2), expected[:, :, 1:])


@pytest.mark.parametrize(
    "reason",
    ["few tokens", "large share", "float16", "float64", "float64 in autocast", "hook", "adapter"],
    ids=lambda r: r.replace(" ", "-"),
)
def test_dense_product_is_used_where_the_sparse_one_does_not_fit(sparse_calls, monkeypatch, reason):
    linear: nn.Module = nn.Linear(32, 32)
    x, gates = torch.randn(1, 100, 32), torch.ones(1, 100, 4)
    seen = []
    if reason == "float16":  # on a processor with units for it
        monkeypatch.setattr(projections, "_capabilities", lambda: {"architecture": "x86_64", "avx512_fp16": True})
        linear, x, gates = linear.half(), x.half(), gates.half()
    if reason.startswith("float64"):  # autocast leaves it as it is
        linear, x, gates = linear.double(), x.double(), gates.double()
    if reason == "few tokens":
        x, gates = x[:, :10], gates[:, :10]
    if reason == "hook":
        linear.register_forward_hook(lambda *_: seen.append("hook"))
    if reason == "adapter":
        linear = nn.Sequential(linear)
    with torch.autocast("cpu", torch.bfloat16, enabled=reason.endswith("autocast")):
        q = moh.attention.project_queries(linear, x, gates, share=0.9 if reason == "large share" else 0.5)
    assert q.shape == (1, x.shape[1], 4, 8)
    assert sparse_calls == []
    assert seen == (["hook"] if reason == "hook" else [])


@pytest.mark.parametrize(
    ("processor", "width", "most"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, 64, 0.8),
        ({"cpu_name": "Intel Core", "avx512_f": False}, 16, 0.8),
        ({}, 72, 0.65),
        ({"cpu_name": "Intel Xeon", "avx512_f": True}, 16, 0.67),
        ({"cpu_name": "Intel Xeon", "avx512_f": True}, 24, 0.65),
    ],
)
def test_the_share_from_which_on_projections_are_dense_is_that_of_processor_and_width(
    sparse_calls, monkeypatch, processor, width, most
):
    monkeypatch.setattr(projections, "_capabilities", lambda: processor)
    linear, x, gates = nn.Linear(32, 4 * width), torch.randn(1, 100, 32), torch.ones(1, 100, 4)
    with torch.no_grad():
        for share in (most, most + 0.01):
            moh.attention.project_queries(linear, x, gates, share)
            moh.attention.project_output(nn.Linear(4 * width, 32), torch.randn(1, 100, 4, width), gates, share)
    assert sparse_calls == ["cpu_expand", "cpu_sum_heads"]  # of the first share


@pytest.fixture
def units_of_bfloat16(monkeypatch, kernels):
    """As on a processor with dot products of bfloat16: sparse products up to `MaxShares.bfloat16`."""
    monkeypatch.setattr(projections, "_has_dot_products", lambda: True)
    monkeypatch.setattr(projections, "_is_emulated", lambda dtype: False)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32-weights", "bfloat16-weights"])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=["float32-inputs", "bfloat16-inputs"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", ["queries", "qkv", "output"])
def test_autocast_gives_the_dense_products_values_and_gradients_in_its_dtype(
    sparse_calls, units_of_bfloat16, kind, bias, inputs, weights
):
    torch.manual_seed(0)
    gates = (torch.rand(2, 50, 6) < 0.5).float()
    active = gates[..., None]
    linear = nn.Linear(48, 3 * 48 if kind == "qkv" else 48, bias=bias, dtype=weights)
    x = torch.randn(2, 50, 48)
    if kind == "output":
        x = (x.unflatten(-1, (6, 8)) * active).flatten(2)
    x = x.to(inputs).requires_grad_()
    results = []
    for share in (0.5, 1.0):  # the second is too large for the sparse product
        sparse_calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            if kind == "output":
                out = moh.attention.project_output(linear, x.unflatten(-1, (6, 8)), gates, share)
            elif kind == "qkv":
                q, k, v = moh.attention.project_qkv(linear, x, gates, share)
                out = torch.stack([q * active.to(q.dtype), k, v])
            else:
                q = moh.attention.project_queries(linear, x, gates, share)
                out = q * active.to(q.dtype)
        assert out.dtype == torch.bfloat16
        assert len(sparse_calls) == (1 if share == 0.5 else 0)
        wanted = [x, *linear.parameters()]
        grads = torch.autograd.grad(out, wanted, torch.ones_like(out))
        assert [g.dtype for g in grads] == [p.dtype for p in wanted]
        if kind == "output":  # the sparse product gives inactive heads, which are 0, no gradient
            grads = ((grads[0].unflatten(-1, (6, 8)) * active).flatten(2), *grads[1:])
        results.append([out, *grads])
    for sparse, dense in zip(*results, strict=True):
        assert_close(sparse.float(), dense.float(), torch.bfloat16)


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_training_step_under_autocast_projects_active_heads_alone(
    sparse_calls, units_of_bfloat16, monkeypatch, mask, use_checkpoint
):
    torch.manual_seed(0)
    layer = moh.MoHAttention(64, num_heads=8, shared_heads=2, active_heads=2, num_kv_heads=4, router="linear")
    x = torch.randn(2, 50, 64)
    seen = torch.arange(50) < torch.tensor([[50], [30]]) if mask == "padding" else None

    def attend(x):
        return layer(x, is_causal=mask == "causal", key_padding_mask=seen)

    results = []
    for most in (0.7, 0.0):
        sparse_calls.clear()
        monkeypatch.setattr(projections, "MAX_SHARES", projections.MaxShares(0.0, 0.0, 0.0, most))
        monkeypatch.setattr(projections, "MAX_SHARES_INTEL", projections.MAX_SHARES)
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(attend, x, use_reentrant=False) if use_checkpoint else attend(x)
            loss = out.float().square().sum()
        forward = ["cpu_expand", "cpu_sum_heads"] if most else []
        assert sparse_calls == forward
        results.append([out, *torch.autograd.grad(loss, list(layer.parameters()))])
        recomputed = forward if use_checkpoint else []
        assert sparse_calls[len(forward) :][: len(recomputed)] == recomputed
    for sparse, dense in zip(*results, strict=True):
        assert sparse.dtype == dense.dtype
        assert_close(sparse.float(), dense.float(), torch.bfloat16)


@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("wants", ["weight", "input", None])
def test_with_gradients_fewer_heads_are_needed_for_the_sparse_products(sparse_calls, monkeypatch, wants, share):
    monkeypatch.setattr(projections, "MAX_SHARES", projections.MaxShares(0.75, 0.6, 0.75, 0.0))
    monkeypatch.setattr(projections, "MAX_SHARES_INTEL", projections.MAX_SHARES)
    linear = nn.Linear(64, 64).requires_grad_(wants == "weight")
    x, gates = torch.randn(1, 100, 64, requires_grad=wants == "input"), torch.ones(1, 100, 4)
    moh.attention.project_queries(linear, x, gates, share=share)
    assert sparse_calls == ([] if wants and share > 0.6 else ["cpu_expand"])
    sparse_calls.clear()
    with torch.no_grad():
        moh.attention.project_output(linear, x.view(1, 100, 4, 16), gates, share=share)
    assert sparse_calls == ["cpu_sum_heads"]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiled_layer_is_one_graph_and_equals_eager(dtype, autocast):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = moh.MoHAttention(32, num_heads=4, shared_heads=1, active_heads=1, router="linear", dtype=dtype)
    x = torch.randn(1, 80, 32, dtype=dtype, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = compiled(x, is_causal=True), layer(x, is_causal=True)
    weight = torch.randn_like(expected)
    results = [(y, *torch.autograd.grad(y, x, weight)) for y in (got, expected)]
    for of_graph, eager in zip(*results, strict=True):
        if autocast:  # a graph rounds to autocast's dtype in other places
            assert_close(of_graph, eager, torch.bfloat16)
        else:
            torch.testing.assert_close(of_graph, eager)


def test_emulated_bfloat16_is_replaced_at_any_share(sparse_calls, monkeypatch):
    monkeypatch.setattr(projections, "_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": False})
    linear, x, gates = (
        nn.Linear(32, 32).bfloat16(),
        torch.randn(1, 100, 32).bfloat16(),
        torch.ones(1, 100, 4).bfloat16(),
    )
    q = moh.attention.project_queries(linear, x, gates, share=1.0)
    assert sparse_calls == ["cpu_expand"]
    assert_close(q.flatten(2), linear(x), torch.bfloat16)


@pytest.mark.parametrize(
    ("isa_in_use", "has_amx", "share", "is_sparse"),
    [
        ("avx512_bf16", False, 0.5, True),
        ("avx512_bf16", False, 0.9, False),
        ("avx512_bf16", True, 0.5, False),
        ("avx512", False, 0.5, False),
    ],
    ids=["dot-products", "many-heads", "amx", "float-kernels"],
)
def test_bfloat16_units_are_met_by_dot_products_or_left_to_the_dense_product(
    sparse_calls, monkeypatch, isa_in_use, has_amx, share, is_sparse
):
    units = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": has_amx}
    monkeypatch.setattr(projections, "_capabilities", lambda: units)
    monkeypatch.setattr(projections.cpu, "instruction_set", lambda: isa_in_use)
    linear, x = nn.Linear(32, 32).bfloat16(), torch.randn(1, 100, 32).bfloat16()
    moh.attention.project_queries(linear, x, torch.ones(1, 100, 4).bfloat16(), share=share)
    assert sparse_calls == ["cpu_expand"] * is_sparse


@pytest.mark.parametrize("reason", ["offloaded", "quantised", "other-backend"])
def test_linears_that_hide_their_product_and_other_backends_stay_dense(sparse_calls, reason):
    class Quantised(torch.Tensor):
        pass

    linear, x, gates = nn.Linear(32, 32), torch.randn(1, 100, 32), torch.ones(1, 100, 4)
    if reason == "offloaded":
        original = linear.forward
        linear.forward = lambda x: original(x) * 2  # accelerate replaces it like this
    if reason == "quantised":
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    backend = "sdpa" if reason == "other-backend" else None
    q = moh.attention.project_queries(linear, x, gates, share=0.5, backend=backend)
    assert sparse_calls == []
    torch.testing.assert_close(q.flatten(2).as_subclass(torch.Tensor), linear(x).as_subclass(torch.Tensor))


def test_gradient_of_a_weights_gradient_is_the_dense_one():
    x, heads, matrix, gates = case(T=70, C=20, H=2, D=8)
    active = (gates != 0)[..., None]

    def penalty(product):
        (grad,) = torch.autograd.grad(product.square().sum(), matrix, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, matrix))

    dense = penalty((x @ matrix.t()).view(heads.shape) * active)
    sparse = penalty(torch.ops.moh.cpu_expand(x, matrix, gates))
    for got, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


def test_function_transforms_get_the_dense_products_and_work():
    torch.manual_seed(0)
    layer = moh.MoHAttention(32, num_heads=4, shared_heads=1, active_heads=1, router="linear")
    x = torch.randn(1, 80, 32, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def loss(x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected, rtol=1e-4, atol=1e-5)
