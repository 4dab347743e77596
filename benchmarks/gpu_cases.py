"""The cases on a GPU: attention, decoding, projections, and a whole layer, each against every dense version there.

Needs only torch and moh; `gpu.py` times and prints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, Contender, active_heads, balanced_gates
from benchmarks.dense import DenseAttention, heads_of
from moh import MoHAttention
from moh.attention import BACKENDS, Call, moh_attention
from moh.attention.gpu import backend as gpu
from moh.attention.gpu import projections
from moh.attention.gpu.projections import expand, sum_heads

GPU_GRIDS = ("quick", "default", "full")

DENSE = {
    "dense (flash)": SDPBackend.FLASH_ATTENTION,
    "dense (cudnn)": SDPBackend.CUDNN_ATTENTION,
    "dense (efficient)": SDPBackend.EFFICIENT_ATTENTION,
    "dense (math)": SDPBackend.MATH,
}
OURS = ("triton", "flex", "sdpa")
PROJECTED: dict[str, dict[str, float]] = {
    "ours": {},
    "ours (sparse projections)": {"MAX_COST": 9.0, "MIN_TILES": 0},
    "ours (dense projections)": {"MAX_COST": -1.0},
}
"""A layer that chooses its projections, and both forced choices: name -> the constants of `projections` to replace."""

MATH_LIMIT = 2**31
"""Unfused attention is skipped above this many bytes of scores, since it needs them all at once."""

BASE = Case("core", "forward", 4, 32, 8, 2048, 128, "bfloat16", True, shares=(0.25, 0.5, 0.75, 1.0))


def gpu_cases(grid: str) -> dict[str, list[Case]]:
    """Title of a table -> its cases. The targets apply to N >= 2,048, width 64 and 128, bfloat16."""
    both = replace(BASE, mode="forward+backward")
    layer = replace(BASE, subject="layer", router="linear", shares=(0.5, 0.75, 1.0))
    decode = replace(BASE, subject="decode", mode="decode", batch=8, causal=False, length=8192)
    projections = replace(BASE, subject="projections", batch=1, length=8192, kv_heads=32, causal=False)
    if grid == "quick":
        small = dict(batch=1, heads=8, kv_heads=2, length=512, width=64, shares=(0.5,))
        return {
            "Attention alone": [replace(BASE, **small), replace(both, **small)],
            "Decoding": [replace(decode, **small)],
            "Projections": [replace(projections, **{**small, "kv_heads": 8})],
            "Whole layer": [replace(layer, **small)],
        }
    lengths = (2048, 8192) if grid == "default" else (512, 1024, 2048, 4096, 8192, 16384)
    dtypes = ("bfloat16",) if grid == "default" else ("bfloat16", "float16", "float32")
    core = [
        replace(base, length=length, width=width, causal=causal, kv_heads=kv_heads, dtype=dtype)
        for base in (BASE, both)
        for dtype in dtypes
        for width in (64, 128)
        for kv_heads in (32, 8)
        for causal in (False, True)
        for length in lengths
    ]
    return {
        "Attention alone": core,
        "Decoding": [replace(decode, length=n, kv_heads=h) for n in (2048, 8192, 32768) for h in (32, 8)],
        "Projections": [
            replace(projections, mode=mode, heads=heads, kv_heads=heads, width=4096 // heads, length=length)
            for mode in ("forward", "forward+backward")
            for heads in (64, 32)
            for length in (1, 2048, 8192)
            if length > 1 or mode == "forward"
        ],
        "Whole layer": [
            *(replace(layer, mode=m) for m in ("forward", "forward+backward")),
            replace(layer, batch=1, length=8192),
        ],
    }


def contenders(case: Case, device: str) -> list[Contender]:
    """The contenders of a case; those missing on this machine raise when they run, and are reported as failed."""
    torch.manual_seed(0)
    if case.subject == "projections":
        return _projections(case, device)
    return _layers(case, device) if case.subject == "layer" else _attentions(case, device)


def _attentions(case: Case, device: str) -> list[Contender]:
    queries = 1 if case.mode == "decode" else case.length
    q = _heads(case, case.heads, queries, device)
    k, v = (_heads(case, case.kv_heads, case.length, device) for _ in range(2))
    cotangent = torch.randn(case.batch, queries, case.heads, case.width, dtype=case.torch_dtype, device=device)

    def dense(kind: SDPBackend) -> Tensor:
        with sdpa_kernel(kind):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads > case.kv_heads)
        return out.transpose(1, 2)  # [B, N, H, D]

    def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
        return _step(forward, leaves, cotangent, case.backward)

    kinds = {name: kind for name, kind in DENSE.items() if name != "dense (math)" or _scores_fit(case)}
    found = [Contender(name, step(functools.partial(dense, kind), (q, k, v))) for name, kind in kinds.items()]
    flash = _flash_attention()
    if flash is not None:

        def by_flash() -> Tensor:
            out: Tensor = flash(*(x.transpose(1, 2) for x in (q, k, v)), causal=case.causal)
            return out

        found.append(Contender("dense (flash-attn)", step(by_flash, (q, k, v))))
    for share in case.shares:
        active = active_heads(share, case.heads)
        gates = balanced_gates(case.batch, queries, case.heads, active).to(device, case.torch_dtype)
        gates.requires_grad_(case.backward)
        if share == 0.5:

            def masked(gates: Tensor = gates) -> Tensor:
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=case.causal, enable_gqa=case.heads > case.kv_heads
                )
                return out.transpose(1, 2) * gates[..., None]

            found.append(
                Contender("masked (dense, then gates)", step(masked, (q, k, v, gates)), share, active / case.heads)
            )
        for name in _serving(q, k, v, gates):
            run = functools.partial(moh_attention, q, k, v, gates, is_causal=case.causal, backend=name)
            found.append(Contender(f"ours ({name})", step(run, (q, k, v, gates)), share, active / case.heads))
    return found


def _layers(case: Case, device: str) -> list[Contender]:
    dim = case.heads * case.width
    x = torch.randn(case.batch, case.length, dim, dtype=case.torch_dtype, device=device, requires_grad=case.backward)
    cotangent = torch.randn_like(x)

    def step(layer: nn.Module, **rule: float) -> Callable[[], object]:
        layer = layer.to(device, case.torch_dtype).train(case.backward)

        def forward() -> Tensor:
            with patch.multiple(projections, **rule) if rule else nullcontext():
                out: Tensor = layer(x, is_causal=case.causal)
            return out

        return _step(forward, [x, *layer.parameters()], cotangent, case.backward)

    found = [Contender("dense", step(DenseAttention(dim, case.heads, case.kv_heads, case.width)))]
    for share in case.shares:
        active = active_heads(share, case.heads)
        config = heads_of(active, case.heads, case.router or "linear")
        layer = MoHAttention(
            dim,
            case.heads,
            shared_heads=config.shared_heads,
            active_heads=config.active_heads,
            router=config.router,
            num_kv_heads=case.kv_heads,
            head_dim=case.width,
        )
        for name, rule in PROJECTED.items():
            if device == "cuda" or not rule:  # on the CPU there is no such choice
                found.append(Contender(name, step(layer, **rule), share, active / case.heads))
    return found


def _projections(case: Case, device: str) -> list[Contender]:
    """Query and output projection of `batch * length` tokens, each dense and of only the active heads."""
    tokens, dim = case.batch * case.length, case.heads * case.width
    make = functools.partial(torch.randn, dtype=case.torch_dtype, device=device, requires_grad=case.backward)
    x, heads, weight = make(tokens, dim), make(tokens, case.heads, case.width), make(dim, dim)
    for_heads, for_x = torch.randn_like(heads), torch.randn_like(x)

    def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor) -> Callable[[], object]:
        return _step(forward, leaves, cotangent, case.backward)

    found = [
        Contender("dense (queries)", step(lambda: F.linear(x, weight).view_as(heads), (x, weight), for_heads)),
        Contender("dense (output)", step(lambda: F.linear(heads.flatten(1), weight), (heads, weight), for_x)),
    ]
    if (reason := gpu.unavailable(device)) is not None:

        def fail() -> Tensor:
            raise RuntimeError(reason)

        return [*found, Contender("active heads alone", fail)]
    for share in case.shares:
        active = active_heads(share, case.heads)
        gates = balanced_gates(1, tokens, case.heads, active)[0].to(device, case.torch_dtype)
        for name, forward, leaves, cotangent in (
            ("ours (queries)", functools.partial(expand, x, weight, gates), (x, weight), for_heads),
            (
                "ours (output)",
                functools.partial(_project_output, heads, weight, gates),
                (heads, weight),
                for_x,
            ),
        ):
            found.append(Contender(name, step(forward, leaves, cotangent), share, active / case.heads))
    return found


def _project_output(heads: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
    return sum_heads(heads, weight.t(), gates, zeroed=True)


def _heads(case: Case, heads: int, length: int, device: str) -> Tensor:
    """`[B, heads, N, D]`, token-major in memory as projections leave it."""
    x = torch.randn(case.batch, length, heads, case.width, dtype=case.torch_dtype, device=device)
    return x.transpose(1, 2).requires_grad_(case.backward)


def _serving(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> list[str]:
    return [name for name in OURS if BACKENDS[name].why_not(Call(q, k, v, gates)) is None]


def _scores_fit(case: Case) -> bool:
    queries = 1 if case.mode == "decode" else case.length
    return 4 * case.batch * case.heads * queries * case.length <= MATH_LIMIT


def _flash_attention() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    found: Callable[..., Tensor] = flash_attn_func
    return found


def _step(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor, backward: bool
) -> Callable[[], object]:
    if backward:
        # shared heads alone leave the router's rows of the other heads without a gradient
        return lambda: torch.autograd.grad(forward(), leaves, cotangent, allow_unused=True)

    def run() -> object:
        with torch.no_grad():
            return forward()

    return run
