"""Query and output projection of the active heads alone, where that is faster than the dense product.

Both need the gates first, so the queries' only with a router that decides by the layer's input. Not for keys and
values, which every head of a group shares.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from moh.attention import cpu
from moh.attention.plain import is_plain
from moh.attention.refusals import DTYPES, transforms_are_active

MIN_TOKENS = 64
"""With fewer tokens the product is limited by reading the weights, which the sparse one reads less well."""

MAX_SHARE = 0.7
"""Above this share of active heads the dense product is as fast (measured in float32, AVX2: docs/results/speed.md)."""

_UNITS_OF_16_BITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def project_queries(linear: nn.Module, x: Tensor, gates: Tensor, share: float, backend: str | None = None) -> Tensor:
    """Queries of the active heads: `linear(x)` as `[B, N, H, D]`, perhaps with zeros where the gate is 0.

    Args:
        linear: the query projection, C -> H * D.
        x: `[B, N, C]`.
        gates: `[B, N, H]`, 0 where a head is inactive.
        share: expected share of pairs that are active, which decides whether the sparse product is worth it.
        backend: of the attention; the sparse product belongs to `cpu`, named or chosen by None.
    """
    B, N, H = gates.shape
    if not _sparse_is_faster(linear, x, share, backend):
        dense: Tensor = linear(x)
        return dense.view(B, N, H, dense.shape[-1] // H)
    assert isinstance(linear, nn.Linear)  # as _sparse_is_faster has seen
    return _active_queries(linear.weight, linear.bias, x, gates)


def project_qkv(
    linear: nn.Module, x: Tensor, gates: Tensor, share: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`project_queries` and the dense keys and values, of one fused projection: q, k and v, each `[B, N, H, D]`.

    Args as in `project_queries`; `linear` is C -> 3 * H * D, its rows those of the queries, the keys and the values.
    """
    B, N, H = gates.shape
    if not _sparse_is_faster(linear, x, share, backend):
        dense: Tensor = linear(x)
        q, k, v = dense.view(B, N, 3, H, dense.shape[-1] // (3 * H)).unbind(2)
        return q, k, v
    assert isinstance(linear, nn.Linear)
    rows = linear.out_features // 3  # H * D
    q_bias, kv_bias = (None, None) if linear.bias is None else (linear.bias[:rows], linear.bias[rows:])
    k, v = nn.functional.linear(x, linear.weight[rows:], kv_bias).view(B, N, 2, H, rows // H).unbind(2)
    return _active_queries(linear.weight[:rows], q_bias, x, gates), k, v


def _active_queries(weight: Tensor, bias: Tensor | None, x: Tensor, gates: Tensor) -> Tensor:
    B, N, H = gates.shape
    heads: Tensor = torch.ops.moh.cpu_expand(x.flatten(0, 1), weight, gates.detach().flatten(0, 1))
    if bias is not None:
        heads = heads + bias.view(H, -1)
    return heads.view(B, N, H, heads.shape[-1])


def project_output(linear: nn.Module, heads: Tensor, gates: Tensor, share: float, backend: str | None = None) -> Tensor:
    """`linear(heads)` of weighted heads `[B, N, H, D]` that are 0 where the gate is 0 -> `[B, N, C]`.

    Args as in `project_queries`; `linear` is the output projection, H * D -> C.
    """
    if not _sparse_is_faster(linear, heads, share, backend):
        dense: Tensor = linear(heads.flatten(2))
        return dense
    assert isinstance(linear, nn.Linear)
    out: Tensor = torch.ops.moh.cpu_sum_heads(heads.flatten(0, 1), linear.weight.t(), gates.detach().flatten(0, 1))
    if linear.bias is not None:
        out = out + linear.bias
    return out.view(*heads.shape[:2], out.shape[-1])


def _sparse_is_faster(linear: nn.Module, x: Tensor, share: float, backend: str | None) -> bool:
    return (
        backend in (None, "cpu")
        and x.dtype in DTYPES
        and share <= _max_share(x.dtype)
        and x.shape[0] * x.shape[1] >= MIN_TOKENS
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and is_plain(linear, x)
        and not transforms_are_active()
        and cpu.unavailable() is None
    )


def _max_share(dtype: torch.dtype) -> float:
    """Above this share the dense product is as fast.

    16-bit products run on units of their own where the processor has them. Elsewhere PyTorch emulates them, some five
    times slower than the sparse product, which converts to float32.
    """
    if dtype == torch.float32:
        return MAX_SHARE
    return 1.0 if _is_emulated(dtype) else 0.0


@torch.compiler.assume_constant_result
def _is_emulated(dtype: torch.dtype) -> bool:
    capabilities = _capabilities()
    known = capabilities.get("architecture") in ("x86_64", "AMD64")
    return known and not any(capabilities.get(unit) for unit in _UNITS_OF_16_BITS[dtype])


@functools.cache
def _capabilities() -> dict[str, object]:
    return dict(torch.cpu.get_capabilities())
