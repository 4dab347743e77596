"""Promises of the `triton` backend: values and gradients in Triton's interpreter, kernels that compile for GPUs.

The interpreter must be on before Triton is imported, so those tests run once in their own process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import SPECIAL_MASKS, make_inputs

import moh
from moh.attention import Call, choose_backend, moh_attention
from moh.attention.gpu import backend as gpu
from moh.attention.gpu.tiles import MAX_WIDTH, padded, tiles

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

FEW = {
    "causal-H3-kv1-D24-Dv40": dict(B=1, Hkv=1, G=3, Nq=90, D=24, Dv=40, activity="uneven", is_causal=True),
    "float16": dict(B=1, Hkv=1, Nq=70, Nk=100, D=24, activity="uneven", dtype="float16"),
    "decode-in-parts": dict(B=1, Hkv=1, G=4, Nq=1, Nk=600),
    "window": dict(B=1, Hkv=1, G=1, Nq=90, is_causal=True, window=30),
    "blind-rows": dict(B=2, Hkv=1, Nq=8, is_causal=True, mask="blind_rows"),
    "bias": dict(B=1, Hkv=1, Nq=6, mask="bias_per_head"),
    "small-gates-in-float16": dict(B=1, Hkv=1, Nq=20, D=24, dtype="float16", gates=3e-7),
    "nothing-active": dict(B=1, Hkv=1, Nq=6, activity="none"),
    "lowest-rows": dict(B=1, Hkv=1, Nq=40, mask="lowest_rows", is_causal=True),
    # NumPy warns of NaN and of differences of infinities
    "nan-rows": dict(B=2, Hkv=1, Nq=6, mask="nan_rows", warnings="ignore"),
    "inf-in-parts": dict(B=2, Hkv=1, G=4, Nq=1, Nk=600, mask="inf_keys", warnings="ignore"),
}
MANY = {
    "padding": dict(B=2, Hkv=1, Nq=6, mask="padding"),
    "plain": dict(B=1, Hkv=2, Nq=5),
    **{f"{a}-{c}": dict(activity=a, is_causal=c) for a in ("all", "half", "one_pair", "idle_head") for c in (0, 1)},
    **{
        f"{m}-{c}": dict(mask=m, is_causal=c, B=1, Nq=40, Nk=70)
        for m in ("bool_full", "bias_per_key", "bias_blind_rows")
        for c in (0, 1)
    },
    "long": dict(B=1, Hkv=1, G=2, Nq=300, is_causal=1, D=64),
    "window-and-mask": dict(B=1, Hkv=1, G=2, Nq=150, is_causal=1, window=40, mask="bool_2d"),
    "D130": dict(B=1, Hkv=1, G=1, Nq=20, D=130),
    "own-scale": dict(B=1, scale=0.3),
}

MANY_SPECIAL = {
    f"{m}-{c}-{n}": dict(mask=m, is_causal=c, B=2, Hkv=1, Nq=n, Nk=k, activity="uneven", warnings="ignore")
    for m in SPECIAL_MASKS
    for c, n, k in ((1, 40, 40), (0, 40, 70), (0, 1, 600))
}

SCRIPT = """
import sys, functools, json, warnings
import torch
from moh.attention import moh_attention
from moh.attention.call import hide
from moh.attention.gpu import backend as gpu
from moh.attention.testing import assert_same, compare_gradients
from moh.attention.testing_inputs import make_inputs
operator = gpu.triton_attention_op
torch.set_num_threads(1)
assert 'moh.attention.gpu.forward_kernels' not in sys.modules, 'the kernels are imported before a call'
for name, kind in json.loads(sys.argv[1]).items():
    warnings.simplefilter(kind.pop("warnings", "error"), RuntimeWarning)
    window, factor = kind.pop("window", None), kind.pop("gates", 1)
    kind["is_causal"] = bool(kind.get("is_causal"))
    kind["dtype"] = getattr(torch, kind.get("dtype", "float32"))
    inputs = make_inputs(**kind)
    inputs.gates = (inputs.gates.detach() * factor).requires_grad_()
    if inputs.attn_mask is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
    tensors = (inputs.q, inputs.k, inputs.v, inputs.gates)
    gpu.triton_attention_op = lambda *a: operator(*a[:9], window, *a[10:])
    outs = [moh_attention(*tensors, backend="triton", **inputs.options)]
    if window is not None:
        near = torch.ones(*inputs.q.shape[2:3], *inputs.k.shape[2:3], dtype=torch.bool).triu(1 - window)
        inputs.attn_mask = hide(inputs.attn_mask, near)
    outs.append(moh_attention(*tensors, backend="reference", **inputs.options))
    assert_same(*outs, f"{name}: output")
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    got = compare_gradients(*outs, inputs, weight)
    idle = inputs.gates == 0
    assert (outs[0][idle] == 0).all() and (got["q"].transpose(1, 2)[idle] == 0).all(), name
    print(name, flush=True)
"""


def interpret(kinds: dict[str, dict[str, object]]) -> list[str]:
    """Names of the kinds that agree with the reference in the interpreter, in a new process."""
    import json

    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(kinds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@needs_triton
def test_calls_are_served_like_the_reference_in_the_interpreter():
    assert interpret(FEW) == list(FEW)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_more_calls_are_served_like_the_reference_in_the_interpreter():
    assert interpret(MANY | MANY_SPECIAL) == list(MANY | MANY_SPECIAL)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100], ids=lambda sm: f"sm_{sm}")
@pytest.mark.parametrize("kernel", ["forward", "decode", "rows", "keys"])
@pytest.mark.parametrize("width", [64, 128], ids=lambda width: f"D{width}")
def test_kernels_compile_ahead_of_time_without_spilling_registers(kernel, architecture, width, tmp_path, monkeypatch):
    from benchmarks.triton_report import SHARED_LIMIT, compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    usage = compile_kernel(kernel, architecture, width=width, is_causal=kernel != "decode")
    assert usage.spilled == 0
    assert 0 < usage.registers <= 255
    assert usage.shared <= SHARED_LIMIT[architecture] * 1024


VARIANTS = {
    "one-of-everything": dict(Hkv=1, Nq=1, Nk=1, M=1),
    "bool-mask": dict(MASK=1),
    "key-padding": dict(MASK=1, PER_KEY=True),
    "additive-mask": dict(MASK=2),
    "window": dict(CAUSAL=True, WINDOW=True),
    "window-of-one": dict(CAUSAL=True, WINDOW=True, window=1),
    "padded-widths": dict(D=72, DV=40, BD=128, BDV=64),
    "tf32": dict(PRECISION="tf32", element="fp32"),
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_rows_kernel", "backward_keys_kernel"])
def test_every_kind_of_call_compiles_as_it_is_launched(kernel, variant, tmp_path, monkeypatch):
    """The interpreter takes types that the compiler refuses, and a launch turns integers that are 1 into constants."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    change = dict(VARIANTS[variant])
    element = change.pop("element", "bf16")
    tile = dict(BLOCK_M=16, BLOCK_N=16) if element == "fp32" else dict(BLOCK_M=64, BLOCK_N=32)
    split = dict(SPLIT=variant == "one-of-everything") if kernel == "forward_kernel" else {}
    compile_to_ptx(kernel, element, {**CONSTANTS, **tile, **split, "stride_gh": 1, **change})


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("one", [{}, dict(M=1, Hkv=1, BH=1)], ids=["many-rows", "one-row"])
def test_the_parts_of_decoding_are_combined_by_a_kernel_that_compiles(one, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_to_ptx("combine_kernel", "bf16", {"G": 4, "DV": 64, "BDV": 64, "BLOCK_S": 32, **one})


CONSTANTS = {
    "G": 4, "D": 64, "DV": 64, "BD": 64, "BDV": 64, "CAUSAL": False, "WINDOW": False, "MASK": 0, "PER_KEY": False,
    "PRECISION": "ieee",
}  # fmt: skip


def compile_to_ptx(kernel: str, element: str, constants: dict[str, object]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moh.attention.gpu import backward_kernels, forward_kernels

    function = getattr(forward_kernels, kernel, None) or getattr(backward_kernels, kernel)
    parts = kernel == "combine_kernel" or constants.get("SPLIT")
    floats = {"most_ptr", "total_ptr", "delta_ptr", "part_most_ptr", "part_total_ptr", "parts_ptr"}
    floats |= {"out_ptr"} if constants.get("SPLIT") else set()
    mask = "u8" if constants.get("MASK") == 1 else element

    def type_of(name: str) -> str:
        if not name.endswith("_ptr"):
            return "fp32" if name in ("scale", "factor") else "i32"
        if name in ("rows_ptr", "counts_ptr", "before_ptr"):
            return "*i32"
        return "*fp32" if name in floats else f"*{mask if name == 'mask_ptr' else element}"

    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else type_of(name) for name in function.arg_names}
    source = ASTSource(function, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    assert ".entry" in compiled.asm["ptx"] and (parts or "most_ptr" in function.arg_names)


@needs_triton
@pytest.mark.parametrize("Nk", [1, 600], ids=["whole", "in-parts"])
def test_launches_fit_the_grid_and_happen_on_the_tensors_device(Nk, recorded_launches):
    """A GPU takes 65,535 programs in the second and third dimension; Triton launches on the current device."""
    from moh.attention.gpu import backward_kernels, forward_kernels
    from moh.attention.gpu.operators import triton_attention_backward_op, triton_attention_op

    launches = recorded_launches(forward_kernels, backward_kernels)
    B = 70_000 if Nk == 1 else 2
    q, k, gates = (torch.zeros(1).expand(shape) for shape in ((B, 1, 3, 8), (B, 1, Nk, 8), (B, 3, 1)))
    packed = [torch.zeros(1, dtype=torch.int32).expand(shape) for shape in ((B, 1, 3), (B, 1), (B, 1, 4))]
    out, softmax = triton_attention_op(q, k, k, gates, None, *packed, False, None, None)
    triton_attention_backward_op(out, q, k, k, gates, None, *packed, out, softmax, False, None, None)
    expected = {"forward_kernel", "backward_rows_kernel", "backward_keys_kernel"}
    assert set(launches) == expected | ({"combine_kernel"} if Nk > 1 else set())
    for grid in launches.values():
        assert B <= grid[0] < 2**31 and all(size < 65_536 for size in grid[1:])


@pytest.mark.parametrize("router", ["two_stage", "single_stage", "query_norm", "linear"])
@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["kv4", "kv2"])
def test_a_routed_layer_reads_nothing_from_the_device(router, num_kv_heads, monkeypatch):
    """With fake tensors, reading a number, or a size that depends on one, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    with FakeTensorMode():
        layer = moh.MoHAttention(
            64, 4, shared_heads=1, active_heads=1, router=router, num_kv_heads=num_kv_heads, device="cuda"
        ).train()
        x = torch.empty(2, 70, 64, device="cuda", requires_grad=True)
        out = layer(x, is_causal=True)
    assert out.shape == x.shape and out.device.type == "cuda" and out.requires_grad
    with FakeTensorMode(), pytest.raises(Exception, match=r"[Dd]ata|aten\._local_scalar_dense"):
        bool(torch.empty(1, device="cuda") > 0)  # what this test would see


@needs_triton
def test_report_refuses_what_it_does_not_know_by_name():
    from benchmarks.triton_report import compile_kernel

    with pytest.raises(
        ValueError, match=r"kernel must be one of 'forward', 'decode', 'rows', 'keys', 'expand', .*got 'sideways'"
    ):
        compile_kernel("sideways", 90)


def test_every_width_has_tiles_that_tensor_cores_can_use():
    for width in range(1, MAX_WIDTH + 1):
        assert padded(width) >= max(width, 16) and padded(width).bit_count() == 1
        for itemsize in (2, 4):
            for major in (8, 9, 10, 12):
                table = tiles(width, itemsize, major)
                for tile in (table.forward, table.rows, table.keys, table.decode):
                    assert min(tile.rows, tile.keys) >= 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_and_is_not_chosen():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"backend 'triton' can't handle this call: .*(NVIDIA|not installed)"):
        moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="triton")
    assert choose_backend(inputs.call).name != "triton"


def test_without_triton_it_says_that_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu._unavailable.cache_clear()
    try:
        assert "Triton is not installed" in gpu._unavailable("cuda")
    finally:
        gpu._unavailable.cache_clear()


def test_without_triton_a_gpu_gets_a_backend_that_needs_none(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, gates = torch.empty(1, 2, 5, 16, device="cuda"), torch.empty(1, 5, 2, device="cuda")
        if not torch.cuda.is_available():  # the kernels' own backend reports this; Triton would handle the other
            assert choose_backend(Call(q, q, q, gates)).name == "flex"
        monkeypatch.setattr(gpu, "unavailable", lambda device: "Triton is not installed")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert choose_backend(Call(q, q, q, gates)).name == "sdpa"
        with pytest.raises(
            ValueError, match=r"backend 'flex' can't handle this call: .* Triton, which is not installed"
        ):
            choose_backend(Call(q, q, q, gates), "flex")


def test_operators_know_their_shapes_without_running():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moh.attention.gpu.operators import triton_attention_backward_op, triton_attention_op

    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 5, 8), torch.empty(2, 2, 6, 8), torch.empty(2, 2, 6, 3)
        gates, rows = torch.empty(2, 5, 4), torch.empty(2, 2, 10, dtype=torch.int32)
        rest = (rows, torch.empty(2, 2, dtype=torch.int32), torch.empty(2, 2, 6, dtype=torch.int32))
        out, softmax = triton_attention_op(q, k, v, gates, None, *rest, True, None, None)
        assert out.shape == (2, 5, 4, 3) and softmax.shape == (2, 2, 2, 10)
        assert softmax.dtype == torch.float32
        grads = triton_attention_backward_op(out, q, k, v, gates, None, *rest, out, softmax, True, None, None)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, gates.shape]
