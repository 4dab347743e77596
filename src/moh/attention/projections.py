"""Query and output projection of the active heads alone, where that is faster than the dense product.

Both need the gates first; for queries the router has to decide by the layer's input. Keys and values, which the heads of
a group share, always take dense products. Under autocast inputs, weights and biases are converted to its dtype, as for the
dense product.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moh.attention import cpu
from moh.attention.call import DTYPES, autocasts, transforms_are_active, unsupported_dtype
from moh.attention.gpu import backend as gpu
from moh.attention.gpu import projections as on_gpu
from moh.attention.gpu.tiles import major_of
from moh.routing import Router, RoutingInfo, Scorer
from moh.routing.router import is_untouched

MIN_TOKENS = 64
"""With fewer tokens reading the weights limits the product, and the sparse one reads them less efficiently."""


class MaxShares(NamedTuple):
    """Largest shares of active heads at which the sparse products are faster than the dense one on a processor.

    Attributes:
        float32: where both are in float32.
        training: the same where gradients are required, whose sparse products are less efficient.
        uneven: the same for heads whose width is not a multiple of 16 and leaves lanes empty, such as DiT-XL's 72.
        bfloat16: where both use the processor's dot products of bfloat16.
    """

    float32: float
    training: float
    uneven: float
    bfloat16: float


MAX_SHARES = MaxShares(0.8, 0.8, 0.65, 0.7)
"""Measured on AMD's processors with AVX2 and AVX-512 (Zen 4)."""

MAX_SHARES_INTEL = MaxShares(0.67, 0.6, 0.65, 0.85)
"""On Intel's with AVX-512, whose dense product in float32 takes two thirds of the time per pair (a Xeon, family 6, model 207)."""

Kind = Literal["queries", "qkv", "output"]
"""Which projection: "queries" (C -> H * D), "qkv" (C -> 3 * H * D) or "output" (H * D -> C)."""

_UNITS_OF_16_BITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def route_and_project(
    router: Router, q_proj: nn.Module, x: Tensor, backend: str | None = None
) -> tuple[RoutingInfo, Tensor]:
    """Route `x` `[B, N, C]` and compute the queries `[B, N, H, D]`.

    A router that reads the queries needs all of them; with another one they may be computed for the active heads alone
    (`project_queries`), and are 0 elsewhere.
    """
    if router.reads_queries:
        q = q_proj(x).unflatten(-1, (router.heads_here, -1))  # [B, N, H, D]
        return router(q=q), q
    routing: RoutingInfo = router(x)
    return routing, project_queries(q_proj, x, routing.gates, router.usual_share(), backend)


def project_queries(linear: nn.Module, x: Tensor, gates: Tensor, share: float, backend: str | None = None) -> Tensor:
    """Queries of the active heads: `linear(x)` as `[B, N, H, D]`, perhaps with zeros where the gate is 0.

    Args:
        linear: the query projection, C -> H * D.
        x: `[B, N, C]`.
        gates: `[B, N, H]`, 0 where a head is inactive.
        share: expected share of pairs that are active, which decides whether the sparse product is worth it.
        backend: of the attention; `cpu` and `triton` have sparse products, and None may choose them.
    """
    B, N, H = gates.shape
    kernels = _sparse_kernels(linear, x, "queries", H, share, backend)
    if kernels is None:
        dense: Tensor = linear(x)
        return dense.view(B, N, H, dense.shape[-1] // H)
    assert isinstance(linear, nn.Linear)  # checked by _why_dense
    return _active_queries(kernels, linear.weight, linear.bias, x, gates)


def project_qkv(
    linear: nn.Module, x: Tensor, gates: Tensor, share: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each `[B, N, H, D]`, of one fused projection: q as by `project_queries`, k and v dense.

    Args as in `project_queries`; `linear` is C -> 3 * H * D, with the rows of queries, keys and values in this order.
    """
    B, N, H = gates.shape
    kernels = _sparse_kernels(linear, x, "qkv", H, share, backend)
    if kernels is None:
        dense: Tensor = linear(x)
        q, k, v = dense.view(B, N, 3, H, dense.shape[-1] // (3 * H)).unbind(2)
        return q, k, v
    assert isinstance(linear, nn.Linear)
    rows = linear.out_features // 3  # H * D
    q_bias, kv_bias = (None, None) if linear.bias is None else (linear.bias[:rows], linear.bias[rows:])
    k, v = nn.functional.linear(x, linear.weight[rows:], kv_bias).view(B, N, 2, H, rows // H).unbind(2)
    return _active_queries(kernels, linear.weight[:rows], q_bias, x, gates), k, v


def _active_queries(kernels: str, weight: Tensor, bias: Tensor | None, x: Tensor, gates: Tensor) -> Tensor:
    B, N, H = gates.shape
    expand = on_gpu.expand if kernels == "triton" else torch.ops.moh.cpu_expand
    dtype = _product_dtype(x)
    heads: Tensor = expand(x.flatten(0, 1).to(dtype), weight.to(dtype), gates.detach().flatten(0, 1))
    if bias is not None:
        heads = heads + bias.view(H, -1).to(dtype)
    return heads.view(B, N, H, heads.shape[-1])


def project_output(linear: nn.Module, heads: Tensor, gates: Tensor, share: float, backend: str | None = None) -> Tensor:
    """`linear(heads)` of weighted heads `[B, N, H, D]` that are 0 where the gate is 0 -> `[B, N, C]`.

    Args as in `project_queries`; `linear` is the output projection, H * D -> C.
    """
    kernels = _sparse_kernels(linear, heads, "output", heads.shape[2], share, backend)
    if kernels is None:
        dense: Tensor = linear(heads.flatten(2))
        return dense
    assert isinstance(linear, nn.Linear)
    dtype = _product_dtype(heads)
    rows, matrix, pairs = heads.flatten(0, 1).to(dtype), linear.weight.to(dtype).t(), gates.detach().flatten(0, 1)
    if kernels == "triton":
        out = on_gpu.sum_heads(rows, matrix, pairs, zeroed=True)
    else:
        out = torch.ops.moh.cpu_sum_heads(rows, matrix, pairs)
    if linear.bias is not None:
        out = out + linear.bias.to(dtype)
    return out.view(*heads.shape[:2], out.shape[-1])


def projections_passed_over(
    linear: nn.Module, x: Tensor, kind: Kind, num_heads: int, share: float, backend: str | None = None
) -> dict[str, str | None]:
    """Why the sparse products of each backend would be passed over for the dense one; None if they would be used.

    Args:
        linear: the projection.
        x: what it projects, `[B, N, C]` or the heads `[B, N, H, D]`; only shape, dtype, device and whether gradients are
            required count.
        kind: which projection it is.
        num_heads: H.
        share: expected share of pairs that are active.
        backend: that of the attention, None if it is chosen.
    """
    return {name: _why_dense(name, linear, x, kind, num_heads, share, backend) for name in ("cpu", "triton")}


def is_plain(linear: nn.Module, x: Tensor) -> bool:
    """Whether `linear` is PyTorch's own or a router's: no adapter, hook, quantisation or offloading.

    Weight and bias must be on x's device and of x's dtype, or of one that autocast converts.
    """
    if type(linear) not in (nn.Linear, Scorer) or not is_untouched(linear):
        return False
    return all(_is_plain_tensor(tensor, x) for tensor in (linear.weight, linear.bias) if tensor is not None)


def _is_plain_tensor(tensor: Any, x: Tensor) -> bool:
    # While torch.compile traces, a plain weight may be a fake tensor, but one of torchao's is still its own.
    plain = type(tensor) in (nn.Parameter, Tensor) or (torch.compiler.is_compiling() and not is_wrapper(tensor))
    fits = tensor.dtype == x.dtype or (autocasts(x) and tensor.dtype in DTYPES)
    return plain and fits and tensor.device == x.device


class Matrix(NamedTuple):
    """A linear layer as the operators of one new token read it.

    Attributes:
        weight: `[rows, columns]` of the input's dtype, or int8.
        bias: `[rows]` or None.
        scale: what each row of an int8 weight is multiplied by, `[rows, 1]` float32; None for other weights.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def halves(self) -> tuple[Matrix, Matrix]:
        """The first and the last rows, equally many."""
        parts = [(None, None) if part is None else part.chunk(2) for part in self]
        return Matrix(*(part[0] for part in parts)), Matrix(*(part[1] for part in parts))  # type: ignore[arg-type]


def matrix_of(linear: nn.Module, x: Tensor) -> Matrix | None:
    """What the operators of one new token multiply x by; None for a layer that is more than a product they know.

    They know plain weights and torchao's int8 weights with a scale for each row and no zero points (`Int8WeightOnlyConfig`).
    """
    if is_plain(linear, x):
        return Matrix(linear.weight, linear.bias, None)  # type: ignore[arg-type]
    weight: Any = linear.weight if type(linear) is nn.Linear and is_untouched(linear) else None
    if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None or weight.dtype != x.dtype:
        return None
    integers, scale, bias = weight.qdata, weight.scale, linear.bias
    if integers.device != x.device or integers.dim() != 2 or (bias is not None and bias.dtype != x.dtype):
        return None
    if scale.shape != (integers.shape[0], 1) or scale.dtype != torch.float32 or not is_symmetric(weight):
        return None
    return Matrix(integers, bias, scale)  # type: ignore[arg-type]


def is_symmetric(weight: Any) -> bool:
    """Whether the zero points of torchao's weight, if it has any, are all 0; remembered, since every token asks."""
    zero_point: Tensor | None = getattr(weight, "zero_point", None)
    if zero_point is None:
        return True
    version = None if zero_point.is_inference() else zero_point._version
    known: tuple[int | None, bool] | None = vars(zero_point).get("_moh_zero")
    if known is None or known[0] != version:
        known = (version, not bool(zero_point.any()))
        vars(zero_point)["_moh_zero"] = known
    return known[1]


def is_wrapper(weight: Any) -> bool:
    """Whether a weight is of a class that keeps its numbers in other tensors, such as torchao's and `DTensor`."""
    return hasattr(type(weight), "__tensor_flatten__")  # of the type: torch.compile does not know the instance's


def sparse_pays_on_cpu(x: Tensor, width: int, share: float) -> bool:
    """Whether products of active pairs alone would be used for x `[B, N, C]` of a plain layer, without gradients."""
    return x.shape[0] * x.shape[1] >= MIN_TOKENS and _why_not_cpu(x.dtype, width, share, trains=False) is None


def _sparse_kernels(
    linear: nn.Module, x: Tensor, kind: Kind, num_heads: int, share: float, backend: str | None
) -> str | None:
    """Whose sparse products to use, "cpu" or "triton"; None for the dense product."""
    name = "cpu" if x.device.type == "cpu" and backend != "triton" else "triton"
    return name if _why_dense(name, linear, x, kind, num_heads, share, backend) is None else None


def _why_dense(
    name: str, linear: nn.Module, x: Tensor, kind: Kind, num_heads: int, share: float, backend: str | None
) -> str | None:
    # Don't format a size of x into the reason: torch.compile would specialise on it.
    device = x.device.type
    if backend not in (None, name):
        return f"the attention's backend is {backend!r}"
    if (reason := unsupported_dtype(x)) is not None:
        return reason
    if name == "cpu" and device != "cpu":
        return f"it runs on the CPU, not on {device}"
    if name == "cpu" and x.shape[0] * x.shape[1] < MIN_TOKENS:
        return f"it needs at least {MIN_TOKENS} tokens"
    if name == "triton" and device != "cuda" and backend is None:
        return f"on {device} it is used only by name"
    if name == "triton" and (unavailable := gpu.unavailable(device)) is not None:
        return str(unavailable)
    if name == "triton" and autocasts(x):
        return "autocast is on"
    if not is_plain(linear, x):
        return "the layer is more than a product with its weight: an adapter, a hook, quantised or of another dtype"
    if transforms_are_active():
        return "it has no rules for torch.func's transforms"
    assert isinstance(linear, nn.Linear)
    if name == "triton":
        return _why_not_triton(linear, x, kind, num_heads, share)
    rows = {"queries": linear.out_features, "qkv": linear.out_features // 3, "output": linear.in_features}[kind]
    trains = torch.is_grad_enabled() and _wants_gradient(linear, x)
    return _why_not_cpu(_product_dtype(x), rows // num_heads, share, trains=trains)


def _why_not_cpu(dtype: torch.dtype, width: int, share: float, *, trains: bool) -> str | None:
    # `cpu.unavailable` comes last: it may build the kernels.
    most = _max_share(dtype, width, trains=trains)
    if most == 0.0:
        return f"PyTorch's product in {str(dtype).removeprefix('torch.')} is faster on this processor"
    if share > most:
        return f"with more than {most:.0%} of the heads in use the dense product is as fast"
    return cpu.unavailable()


def _why_not_triton(linear: nn.Linear, x: Tensor, kind: Kind, num_heads: int, share: float) -> str | None:
    tokens = x.shape[0] * x.shape[1]
    if tokens == 0:
        return "it needs at least one token"
    if (reason := gpu.not_interpreted(x.device.type, x.dtype)) is not None:
        return reason
    if kind == "output" and tokens > on_gpu.FEW_TOKENS and not (torch.is_grad_enabled() and _wants_gradient(linear, x)):
        return "its output projection is the dense product unless gradients are required"
    rows, channels = linear.out_features // (3 if kind == "qkv" else 1), linear.in_features
    if kind == "output":
        rows, channels = channels, rows
    return on_gpu.dense_is_faster(
        tokens=tokens,
        heads=num_heads,
        width=rows // num_heads,
        channels=channels,
        share=share,
        dtype=x.dtype,
        major=major_of(x.device),
    )


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch's product of x with a weight is computed in: autocast's, or x's own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _wants_gradient(linear: nn.Linear, x: Tensor) -> bool:
    return x.requires_grad or linear.weight.requires_grad


def _max_share(dtype: torch.dtype, width: int, *, trains: bool) -> float:
    """Above this share the dense product is as fast.

    Where the processor has units for 16-bit products, PyTorch uses them; ours are measured only with dot products of
    bfloat16, not on a matrix unit (AMX). Without such units PyTorch emulates the product, about five times slower than
    ours, which converts to float32.
    """
    shares: MaxShares = _max_shares()
    if dtype == torch.float32:
        most = shares.training if trains else shares.float32
        return most if width % 16 == 0 else min(most, shares.uneven)
    if _is_emulated(dtype):
        return 1.0
    return shares.bfloat16 if dtype == torch.bfloat16 and _has_dot_products() else 0.0


@torch.compiler.assume_constant_result
def _max_shares() -> MaxShares:
    capabilities = _capabilities()
    intel = str(capabilities.get("cpu_name", "")).startswith("Intel") and capabilities.get("avx512_f")
    return MAX_SHARES_INTEL if intel else MAX_SHARES


@torch.compiler.assume_constant_result
def _is_emulated(dtype: torch.dtype) -> bool:
    capabilities = _capabilities()
    known = capabilities.get("architecture") in ("x86_64", "AMD64")
    return known and not any(capabilities.get(unit) for unit in _UNITS_OF_16_BITS[dtype])


@torch.compiler.assume_constant_result
def _has_dot_products() -> bool:
    """Whether our kernels use dot products of bfloat16 and PyTorch has nothing faster."""
    capabilities = _capabilities()
    if not capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return False  # without building the kernels
    return cpu.unavailable() is None and cpu.instruction_set() == "avx512_bf16"


@functools.cache
def _capabilities() -> dict[str, object]:
    return dict(torch.cpu.get_capabilities())
