"""Promises of the projections' Triton kernels: values and gradients in Triton's interpreter, compiling for GPUs.

The interpreter must be on before Triton is imported, so those tests run once in their own process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import moh
from moh.attention import project_output, project_queries, projections, testing
from moh.attention.gpu import backend as gpu
from moh.attention.gpu import projections as operators
from moh.attention.gpu.projections import MAX_COST, dense_is_faster
from moh.attention.gpu.tiles import product_tile, relative_cost

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

FEW = {
    "more-than-one-block": dict(tokens=70, channels=40, heads=3, width=24, dtype="float16"),
    "columns": dict(tokens=40, channels=64, heads=2, width=64, dtype="float16", columns=True),
    "one-token": dict(tokens=1, channels=300, heads=4, width=33, dtype="float16"),
    "few-tokens": dict(tokens=13, channels=20, heads=2, width=16, columns=True),
    "nothing-active": dict(tokens=30, channels=16, heads=2, width=16, dtype="float16", active=0.0),
    "no-tokens": dict(tokens=0, channels=8, heads=2, width=4),
}
MANY = {
    "float32": dict(tokens=70, channels=40, heads=3, width=24),
    "slices-of-a-wide-head": dict(tokens=300, channels=64, heads=2, width=130, dtype="float16"),
    "whole-blocks": dict(tokens=600, channels=256, heads=2, width=64, dtype="float16"),
    "everything-active": dict(tokens=300, channels=70, heads=2, width=64, dtype="float16", active=1.0),
    "one-of-everything": dict(tokens=1, channels=1, heads=1, width=1),
    "wide-heads-of-few-tokens": dict(tokens=3, channels=70, heads=2, width=130),
    "strided": dict(tokens=50, channels=24, heads=2, width=16, dtype="float16", strided=True),
    "strided-few": dict(tokens=9, channels=24, heads=2, width=16, dtype="float16", strided=True),
}

SCRIPT = """
import sys, json
import torch
from moh.attention.testing import compare_projections
torch.set_num_threads(1)
assert 'moh.attention.gpu.projection_kernels' not in sys.modules, 'the kernels are imported before a call'
for name, kind in json.loads(sys.argv[1]).items():
    kind["dtype"] = getattr(torch, kind.get("dtype", "float32"))
    compare_projections(**kind)
    print(name, flush=True)
"""

PACK = """
import torch
from moh.attention.gpu import projections as operators
torch.set_num_threads(1)
for T, H, share in ((3000, 20, 0.5), (1025, 3, 0.9), (300, 520, 0.1), (256, 32, 1.0), (40, 1, 0.0), (1, 5, 0.5)):
    torch.manual_seed(T)
    gates = torch.rand(H, T).t() * (torch.rand(T, H) < share)
    rows, counts = operators.triton_pack_op(gates)
    active = (gates != 0).t()
    assert rows.equal((~active).int().sort(dim=1, stable=True).indices.int()), (T, H)
    assert counts.equal(active.sum(1).int()), (T, H)
    print(T, H, -(-T // operators.pack_tokens(H)))
"""

TWICE = """
import torch
from moh.attention.gpu.projections import expand, sum_heads
torch.set_num_threads(1)
torch.manual_seed(0)
for T in (20, 6):
    x, heads = torch.randn(T, 12, requires_grad=True), torch.randn(T, 2, 8, requires_grad=True)
    matrix, gates = torch.randn(16, 12, requires_grad=True), torch.rand(T, 2).round()
    used = (gates != 0)[..., None]
    products = (
        (x, expand(x, matrix, gates), (x @ matrix.t()).view(T, 2, 8) * used),
        (heads, sum_heads(heads, matrix, gates), (heads * used).flatten(1) @ matrix),
    )
    for leaf, *outs in products:
        penalties = []
        for out in outs:
            grads = torch.autograd.grad(out.square().sum(), (leaf, matrix), create_graph=True)
            penalties.append(torch.autograd.grad(sum(g.sin().sum() for g in grads), (leaf, matrix)))
        for got, expected in zip(*penalties, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        print(T)
"""

LAYER = """
import torch
import moh
from moh.attention import projections
from moh.attention.gpu import projections as operators
torch.set_num_threads(1)
operators.MIN_TILES, operators.MIN_BYTES = 0, 0
operators.MAX_COST = 99.0
called, originals = [], {name: getattr(operators, name) for name in ("expand", "sum_heads")}
for name, operator in originals.items():
    setattr(operators, name, lambda *a, name=name, operator=operator, **k: called.append(name) or operator(*a, **k))
torch.manual_seed(0)
layer = moh.MoHAttention(
    32, 4, shared_heads=1, active_heads=1, router="linear", num_kv_heads=2, backend="triton", dtype=torch.float16
)
for size in (20, 2):
    x = torch.randn(1, size, 32, dtype=torch.float16, requires_grad=True)
    inputs = [x, *layer.parameters()]
    weight = torch.randn_like(x)
    results = []
    for cost in (99.0, -1.0):
        operators.MAX_COST = cost
        out = layer(x, is_causal=True)
        results.append([out, *torch.autograd.grad(out, inputs, weight)])
        print(*called)
        called.clear()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
operators.MAX_COST = 99.0
for name in ("expand", "sum_heads"):
    setattr(operators, name, originals[name])
out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, is_causal=True)
for got, expected in zip([out, *torch.autograd.grad(out, inputs, weight)], results[0], strict=True):
    torch.testing.assert_close(got, expected)
print("one graph")
x, heads, gates = torch.randn(20, 12), torch.randn(20, 2, 8), torch.rand(20, 2).round()
for matrix in (torch.randn(16, 12), torch.randn(12, 16).t()):
    rows, counts = operators.triton_pack_op(gates)
    leaves = [t.detach().requires_grad_() for t in (x, heads, matrix)]
    for operator, arguments in (
        (operators.triton_pack_op, (gates,)),
        (operators.triton_expand_op, (leaves[0], leaves[2], gates, rows, counts)),
        (operators.triton_expand_op, (leaves[0], leaves[2], gates, None, None)),
        (operators.triton_sum_heads_op, (leaves[1], leaves[2], gates, False)),
        (operators.triton_outer_op, (leaves[1], leaves[0], gates, rows, counts, False)),
    ):
        torch.library.opcheck(operator, arguments, atol=1e-5, rtol=1e-5)
print("registered")
"""


def interpret(script: str, *arguments: str) -> list[str]:
    """The lines that a script prints in a new process, with Triton's interpreter on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@needs_triton
def test_products_and_packed_tokens_are_the_dense_ones_in_the_interpreter():
    packed = ["3000 20 12", "1025 3 3", "300 520 19", "256 32 1", "40 1 1", "1 5 1"]
    assert interpret(SCRIPT + PACK, json.dumps(FEW)) == [*FEW, *packed]  # one process: each imports everything


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_more_products_and_gradients_are_the_dense_ones_in_the_interpreter():
    assert interpret(SCRIPT, json.dumps(MANY)) == list(MANY)


@needs_triton
@pytest.mark.slow
def test_gradients_of_gradients_are_the_dense_ones_in_the_interpreter():
    assert interpret(TWICE) == ["20", "20", "6", "6"]


@needs_triton
@pytest.mark.slow
def test_a_layer_that_names_triton_projects_active_heads_alone_and_gives_the_same():
    assert interpret(LAYER) == [*["expand sum_heads", ""] * 2, "one graph", "registered"]


COMPILED = [
    "expand", "expand_columns", "expand_few", "outer", "outer_columns", "sum_heads", "add_parts", "count", "pack",
]  # fmt: skip


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100], ids=lambda sm: f"sm_{sm}")
@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("width", [64, 128], ids=lambda width: f"D{width}")
def test_kernels_compile_ahead_of_time_without_spilling_registers(kernel, architecture, width, tmp_path, monkeypatch):
    from benchmarks.triton_report import PROJECTIONS, SHARED_LIMIT, compile_kernel

    assert tuple(COMPILED) == PROJECTIONS
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    usage = compile_kernel(kernel, architecture, width=width)
    assert usage.spilled == 0
    assert 0 < usage.registers <= 255
    # Programs of sm_86 and sm_89 get the tiles of sm_80 and have no more than 99 KiB.
    assert usage.shared <= (99 if architecture == 80 else SHARED_LIMIT[architecture]) * 1024


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["one-of-everything", "odd-sizes", "tf32"])
@pytest.mark.parametrize(
    "kernel", ["count_kernel", "pack_kernel", "expand_kernel", "outer_kernel", "sum_heads_kernel", "add_parts_kernel"]
)
def test_every_kind_of_call_compiles_as_it_is_launched(kernel, variant, tmp_path, monkeypatch):
    """The interpreter takes types that the compiler refuses, and a launch turns integers that are 1 into constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moh.attention.gpu import projection_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "H": 3, "D": 24, "BLOCK_M": 32, "BLOCK_D": 32, "BLOCK_C": 32, "BLOCK_T": 16, "BLOCK_H": 16,
        "PACKED": variant != "one-of-everything", "WHOLE": False, "stride_gh": 1, "stride_mc": 1,
        "PRECISION": "tf32" if variant == "tf32" else "ieee",
    }  # fmt: skip
    if variant == "one-of-everything":
        constants |= dict(T=1, C=1, H=1, D=1, stride_gt=1, stride_mr=1, stride_xt=1, stride_ht=1, stride_hh=1)
    element = "fp32" if variant == "tf32" else "bf16"
    parts = "*i32" if kernel in ("count_kernel", "pack_kernel") else "*fp32"
    types = {"rows_ptr": "*i32", "counts_ptr": "*i32", "parts_ptr": parts}
    function = getattr(projection_kernels, kernel)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, f"*{element}" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    source = ASTSource(function, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    assert ".entry" in compiled.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("tokens", [1, 70_000], ids=["one-token", "many"])
def test_launches_fit_the_grid_and_happen_on_the_tensors_device(tokens, recorded_launches):
    from moh.attention.gpu import projection_kernels

    launches = recorded_launches(projection_kernels)
    number = torch.zeros(1, dtype=torch.bfloat16)
    x, heads = number.expand(tokens, 6), number.expand(tokens, 2, 4)
    matrix, gates = number.expand(8, 6), number.expand(tokens, 2)
    rows, counts = operators.triton_pack_op(gates)
    operators.triton_expand_op(x, matrix, gates, *((rows, counts) if tokens > 1 else (None, None)))
    operators.triton_outer_op(heads, x, gates, rows, counts, False)
    operators.triton_sum_heads_op(heads, matrix, gates, False)
    few = {"sum_heads_kernel", "add_parts_kernel"} if tokens == 1 else set()
    assert set(launches) == {"count_kernel", "pack_kernel", "expand_kernel", "outer_kernel"} | few
    for grid in launches.values():
        assert len(grid) == 1 and 0 < grid[0] < 2**31


def test_operators_know_their_shapes_without_running():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, heads, gates = torch.empty(40, 6), torch.empty(40, 2, 4), torch.empty(40, 2)
        for matrix in (torch.empty(8, 6), torch.empty(6, 8).t()):
            matrix.requires_grad_()
            expanded = operators.expand(x.requires_grad_(), matrix, gates)
            summed = operators.sum_heads(heads.requires_grad_(), matrix, gates)
            assert expanded.shape == heads.shape and summed.shape == x.shape
            for out, leaf in ((expanded, x), (summed, heads)):
                grads = torch.autograd.grad(out.sum(), [leaf, matrix])
                assert [g.shape for g in grads] == [leaf.shape, matrix.shape]
                assert grads[1].stride() == matrix.stride()


def test_a_layer_chooses_them_and_reads_nothing_from_the_device(monkeypatch):
    """With fake tensors, reading a number, or a size that depends on one, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    called = []
    for name in ("expand", "sum_heads"):
        operator = getattr(operators, name)
        monkeypatch.setattr(
            operators, name, lambda *a, name=name, operator=operator, **k: called.append(name) or operator(*a, **k)
        )
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    monkeypatch.setattr(projections, "major_of", lambda device: 9)
    monkeypatch.setattr(projections, "is_plain", lambda linear, x: True)  # fake weights have another type
    with FakeTensorMode():
        layer = moh.MoHAttention(
            4096,
            32,
            shared_heads=8,
            active_heads=8,
            router="linear",
            num_kv_heads=8,
            device="cuda",
            dtype=torch.bfloat16,
        )
        x = torch.empty(1, 4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert layer(x, is_causal=True).requires_grad
        assert called == ["expand", "sum_heads"]
        with torch.no_grad():
            layer(x, is_causal=True)
        assert called == ["expand", "sum_heads", "expand"]  # its output projection is the dense product


RULE = dict(tokens=8192, heads=32, width=128, channels=4096, share=0.5, dtype=torch.bfloat16, major=9)


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param({}, None, id="half-of-the-heads"),
        pytest.param(dict(major=8), None, id="sm_80"),
        pytest.param(dict(share=0.75), "more than 0.7 of the dense product", id="large-share"),
        pytest.param(dict(width=64, heads=64), "more than 0.7 of the dense product", id="narrow-heads"),
        pytest.param(dict(width=64, heads=64, share=0.375), None, id="narrow-heads-of-few"),
        pytest.param(dict(dtype=torch.float32), "float32 tiles are small", id="float32"),
        pytest.param(dict(tokens=1024), "fewer than 128 tiles", id="small-batch"),
        pytest.param(dict(channels=512), "fewer than 128 tiles", id="few-channels"),
        pytest.param(dict(tokens=1), None, id="one-token"),
        pytest.param(dict(tokens=1, channels=1024), "less than 16 MiB", id="one-token-of-a-small-model"),
        pytest.param(dict(tokens=8), "use more than 70% of the heads", id="eight-tokens"),
        pytest.param(dict(tokens=100), "more than 0.7 of the dense product", id="no-full-tile"),
    ],
)
def test_choice_is_by_count(change, words):
    reason = dense_is_faster(**{**RULE, **change})
    assert reason is None if words is None else words in reason


def test_cost_by_count_grows_where_tiles_are_narrow_or_padded():
    for major in (8, 9, 10):
        assert relative_cost(128, major) == relative_cost(256, major) == 1
        assert relative_cost(64, major) > 1 / MAX_COST > relative_cost(128, major)
        assert relative_cost(72, major) == pytest.approx(128 / 72)


def test_every_width_has_tiles_that_tensor_cores_can_use():
    for width in (1, 64, 65, 128, 129, 500):
        for itemsize in (2, 4):
            for major in (8, 9, 10, 12):
                tile = product_tile(width, itemsize, major)
                sizes = (tile.tall, tile.wide, tile.inner)
                assert min(sizes) >= 16 and all(size.bit_count() == 1 for size in sizes)


@pytest.mark.parametrize("fault", [None, "wrong", "reads-inactive"])
def test_checks_for_users_pass_what_is_right_and_fail_what_is_not(fault, monkeypatch):
    def expand(x, matrix, gates):
        x = x if fault == "reads-inactive" else x.nan_to_num()
        heads = (x @ matrix.t()).view(*gates.shape, matrix.shape[0] // gates.shape[1])
        return torch.where((gates != 0)[..., None], heads, 0) * (1.1 if fault == "wrong" else 1)

    def sum_heads(heads, matrix, gates):
        out = torch.where((gates != 0)[..., None], heads, 0).flatten(1) @ matrix
        return torch.where(gates.any(1, keepdim=True), out, 0)

    sizes = {name: testing.PROJECTION_SIZES[name] for name in ("T70-C40-H3-D24", "strided", "no-tokens")}
    monkeypatch.setattr(testing, "PROJECTION_SIZES", sizes)
    for function in (expand, sum_heads):
        monkeypatch.setattr(testing, function.__name__, function)
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    monkeypatch.setattr(gpu, "not_interpreted", lambda device, dtype: None)
    outcomes = list(testing.check_projections())
    assert len(outcomes) == len({o.name for o in outcomes}) == 3 * 3 * 2
    failures = [o for o in outcomes if o.failure]
    words = {None: "", "wrong": "off by", "reads-inactive": "not finite"}[fault]
    assert all(words in o.failure for o in failures), failures
    # Without tokens nothing can go wrong.
    assert len(failures) == (0 if fault is None else 2 * 3 * 2), failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_checks_for_users_are_skipped_with_the_reason_where_there_is_no_gpu():
    outcomes = testing.outcomes_of(testing.PROJECTIONS, "cuda")
    assert len(outcomes) > 50 and all(o.skipped for o in outcomes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_product_says_why_it_is_passed_over():
    linear, x = nn.Linear(32, 32), torch.zeros(1, 100, 32)
    reasons = projections.projections_passed_over(linear, x, "queries", 4, 0.5)
    assert reasons["triton"] == "on cpu it is used only by name"
    reasons = projections.projections_passed_over(linear, x, "queries", 4, 0.5, "triton")
    assert reasons["cpu"] == "the attention's backend is 'triton'"
    assert "TRITON_INTERPRET" in reasons["triton"] or "Triton is not installed" in reasons["triton"]
    gates = torch.ones(1, 100, 4)
    torch.testing.assert_close(project_queries(linear, x, gates, 0.5, "triton").flatten(2), linear(x))
    torch.testing.assert_close(project_output(linear, x.view(1, 100, 4, 8), gates, 0.5, "triton"), linear(x))
