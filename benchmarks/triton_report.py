"""Compile the Triton kernels ahead of time, without a GPU, and report what they need, by NVIDIA's assembler.

`python -m benchmarks.triton_report` prints registers, spills and shared memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moh.attention.gpu.tiles import FEW, FEW_32_BITS, Tile, padded, product_tile, tiles

ARCHITECTURES = (80, 90, 100)
KERNELS = ("forward", "decode", "rows", "keys")
PROJECTIONS = (
    "expand", "expand_columns", "expand_few", "outer", "outer_columns", "sum_heads", "add_parts", "count", "pack",
)  # fmt: skip
"""Kernels of the projections; `columns`: the matrix is an output projection's, a head's numbers next to each other."""
WIDTHS = (64, 128)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

SHARED_LIMIT = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that one program may have."""


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        kernel: of `KERNELS` or `PROJECTIONS`; "rows" and "keys" are attention's backward pass.
        architecture: 90 is sm_90.
        dtype: of q, k and v.
        width: D of a head.
        is_causal: whether it was compiled so.
        registers: per thread, of at most 255.
        spilled: bytes written to and read back from local memory for want of registers.
        shared: bytes of shared memory per program.
    """

    kernel: str
    architecture: int
    dtype: str
    width: int
    is_causal: bool
    registers: int
    spilled: int
    shared: int


def compile_kernel(
    kernel: str, architecture: int, *, dtype: str = "bfloat16", width: int = 64, is_causal: bool = False
) -> Usage:
    """Compile one kernel, with contiguous tensors; takes some seconds.

    Attention's for 4 query heads per key/value head without a mask, the projections' for 32 heads.

    Raises:
        ValueError: kernel, architecture or dtype is none of those named above.
        RuntimeError: NVIDIA's assembler refuses the code.
    """
    for name, value, known in (
        ("kernel", kernel, KERNELS + PROJECTIONS),
        ("architecture", architecture, ARCHITECTURES),
        ("dtype", dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    itemsize = 4 if dtype == "float32" else 2
    make = _attention_plan if kernel in KERNELS else _projection_plan
    plan = make(kernel, width, itemsize, architecture // 10, is_causal)
    signature = {name: _type(name, DTYPES[dtype], plan) for name in plan.function.arg_names}
    # As at a launch: pointers and the strides of rows are multiples of 16.
    aligned = [
        index
        for index, name in enumerate(plan.function.arg_names)
        if name not in plan.constants and (name.endswith("_ptr") or name.startswith(plan.aligned))
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(plan.function, signature, constexprs=plan.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=plan.options)
    registers, spilled = _assemble(compiled.asm["ptx"])
    return Usage(kernel, architecture, dtype, width, is_causal, registers, spilled, compiled.metadata.shared)


@dataclass(frozen=True)
class _Plan:
    """How a kernel is compiled: its function, constants, warps and stages, float32 pointers, and what 16 divides."""

    function: Any
    constants: dict[str, Any]
    options: dict[str, int]
    floats: tuple[str, ...]
    aligned: tuple[str, ...]


def _attention_plan(kernel: str, width: int, itemsize: int, major: int, is_causal: bool) -> _Plan:
    from moh.attention.gpu import backward_kernels, forward_kernels

    functions = {"rows": backward_kernels.backward_rows_kernel, "keys": backward_kernels.backward_keys_kernel}
    tile: Tile = getattr(tiles(width, itemsize, major), kernel)
    constants = {
        "G": 4, "D": width, "DV": width, "BD": padded(width), "BDV": padded(width), "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys, "CAUSAL": is_causal, "WINDOW": False, "MASK": 0, "PER_KEY": False, "PRECISION": "ieee",
    }  # fmt: skip
    if kernel in ("forward", "decode"):
        constants["SPLIT"] = kernel == "decode"
    floats = ("most_ptr", "total_ptr", "delta_ptr", *["out_ptr"] * (kernel == "decode"))
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    aligned = tuple(f"stride_{x}" for x in "qkvo")
    return _Plan(functions.get(kernel, forward_kernels.forward_kernel), constants, options, floats, aligned)


def _projection_plan(kernel: str, width: int, itemsize: int, major: int, is_causal: bool) -> _Plan:
    from moh.attention.gpu import projection_kernels
    from moh.attention.gpu import projections as sizes

    few = FEW_32_BITS if itemsize == 4 else FEW
    tile = few if kernel == "expand_few" else product_tile(width, itemsize, major)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    base: dict[str, Any] = {"H": 32, "D": width, "stride_gh": 1, "PRECISION": "ieee"}
    columns = kernel.endswith("columns") or kernel == "sum_heads"
    base["stride_mr" if columns else "stride_mc"] = base["stride_or" if columns else "stride_oc"] = 1
    blocks: dict[str, Any] = {"BLOCK_D": tile.wide, "WHOLE": True, "PACKED": kernel != "expand_few"}
    if kernel.startswith("expand"):
        function, blocks = projection_kernels.expand_kernel, blocks | {"BLOCK_M": tile.tall, "BLOCK_C": tile.inner}
    elif kernel.startswith("outer"):
        options["num_stages"] = tile.chained_stages
        function, blocks = projection_kernels.outer_kernel, blocks | {"BLOCK_M": tile.inner, "BLOCK_C": tile.tall}
    else:
        packs = kernel in ("count", "pack")
        options = {"num_warps": sizes.PACK_WARPS if packs else 4}
        function = getattr(projection_kernels, f"{kernel}_kernel")
        blocks = {
            "BLOCK_T": sizes.pack_tokens(base["H"]) if packs else sizes.FEW_TOKENS,
            "BLOCK_H": padded(base["H"]),
            "BLOCK_D": sizes.sum_width(width, itemsize),
            "BLOCK_C": sizes.SUM_COLUMNS if kernel == "sum_heads" else sizes.ADD_COLUMNS,
        }
    constants = {name: value for name, value in (base | blocks).items() if name in function.arg_names}
    floats: tuple[str, ...] = () if kernel in ("count", "pack") else ("parts_ptr",)
    return _Plan(function, constants, options, floats, ("stride_", "C"))


def _type(name: str, element: str, plan: _Plan) -> str:
    if name in plan.constants:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "fp32" if name in ("scale", "factor") else "i32"
    if name in plan.floats:
        return "*fp32"
    return "*i32" if name in ("rows_ptr", "counts_ptr", "before_ptr", "parts_ptr") else f"*{element}"


def _assemble(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled), as NVIDIA's assembler tells; of those that come with Triton, the one for this code."""
    from triton.backends import nvidia

    found = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert found is not None  # every PTX file says it
    target = found.group(1)
    folder = Path(nvidia.__file__ or next(iter(nvidia.__path__))).parent
    folder = folder if (folder / "bin").is_dir() else Path(next(iter(nvidia.__path__)))
    newer = folder / "bin" / "ptxas-blackwell"
    tool = newer if target.startswith("sm_10") and newer.exists() else folder / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "kernel.ptx"
        code.write_text(ptx, encoding="utf-8")
        command = [str(tool), "-v", f"--gpu-name={target}", str(code), "-o", str(Path(scratch) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool.name} failed: {' '.join(done.stderr.split())}")
    printed = done.stderr + done.stdout
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", printed)]
    if not registers:
        raise RuntimeError(f"{tool.name} reported no registers: {' '.join(printed.split())}")
    return max(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill", printed))


def usages(
    architectures: Sequence[int] = ARCHITECTURES, dtypes: Sequence[str] = ("bfloat16", "float32")
) -> Iterator[Usage]:
    """Every kernel for these architectures and dtypes, all widths, causal and not: minutes."""
    for dtype, width, architecture, kernel in product(dtypes, WIDTHS, architectures, KERNELS + PROJECTIONS):
        for is_causal in (False, True) if kernel in ("forward", "rows", "keys") else (False,):
            yield compile_kernel(kernel, architecture, dtype=dtype, width=width, is_causal=is_causal)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a kernel spills or needs more shared memory than there is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_report", description=main.__doc__)
    parser.add_argument("--sm", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    options = parser.parse_args(arguments)
    print("| kernel | GPU | dtype | D | causal | registers | spilled, bytes | shared memory, KiB |")
    print("|" + " --- |" * 8)
    bad = 0
    for u in usages(options.sm, options.dtype):
        bad += u.spilled > 0 or u.shared > SHARED_LIMIT[u.architecture] * 1024
        cells = (u.kernel, f"sm_{u.architecture}", u.dtype, u.width, "yes" if u.is_causal else "no", u.registers)
        print(f"| {' | '.join(map(str, cells))} | {u.spilled} | {u.shared / 1024:.1f} |", flush=True)
    print(f"{bad} of these spill or need too much shared memory" if bad else "none spills")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
