"""The Triton kernels as operators of PyTorch, `moh::triton_attention` and its backward pass.

Opaque to `torch.compile`, which keeps one graph around them; shapes are static and no number is read from the device, so
that a CUDA graph can record them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moh.attention.call import with_four_dims
from moh.attention.gpu.tiles import major_of, padded, tiles

SPLIT_KEYS = 256
"""Decoding cuts the keys into parts of at least this many: shorter ones cost more to combine than they save."""

MAX_SPLITS = 64
"""More parts than this would not fit the registers of the program that combines them."""

DECODE_ROWS = 16
"""Up to this many rows per key/value head fit one program; more programs then split the keys."""

_Mask = tuple[Tensor, int, bool, tuple[int, int, int, int]]


def _strides(x: Tensor, *dims: int) -> tuple[int, ...]:
    return tuple(x.stride(d) for d in dims)


def _mask(attn_mask: Tensor | None, like: Tensor) -> _Mask:
    """(what the kernel reads, 0 none / 1 bool / 2 additive, whether it depends on the key alone, its strides)"""
    if attn_mask is None:
        return like, 0, False, (0, 0, 0, 0)
    mask = with_four_dims(attn_mask)
    b, h, q, k = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    kind = 1 if mask.dtype == torch.bool else 2
    return mask.view(torch.uint8) if kind == 1 else mask, kind, h == 0 and q == 0, (b, h, q, k)


def _constants(q: Tensor, v: Tensor, G: int, is_causal: bool, window: int | None, mask: _Mask) -> dict[str, Any]:
    D, Dv = q.shape[-1], v.shape[-1]
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "G": G, "D": D, "DV": Dv, "BD": padded(D), "BDV": padded(Dv), "CAUSAL": is_causal,
        "WINDOW": window is not None, "MASK": mask[1], "PER_KEY": mask[2], "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip


def _splits(q: Tensor, Hkv: int, Nk: int, M: int) -> int:
    """Number of parts that the keys are cut into: with few rows, enough to keep the device busy."""
    if M > DECODE_ROWS or q.device.type != "cuda":
        units = 1 if M > DECODE_ROWS else 8
    else:
        units = torch.cuda.get_device_properties(q.device).multi_processor_count * 2
    return max(1, min(-(-Nk // SPLIT_KEYS), units // max(1, q.shape[0] * Hkv), MAX_SPLITS))


def _factor(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@torch.library.custom_op("moh::triton_attention", mutates_args=())
def triton_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    rows: Tensor,
    counts: Tensor,
    before: Tensor,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(weighted heads `[B, Nq, H, Dv]`, what the backward pass needs of each packed row's softmax); int32 rows.

    The latter is float32 `[2, B, Hkv, M]`: the largest score in units of log2, +inf where a row sees no key, and the sum
    of `2^(score - largest)`. One number for both, the log-sum-exp, would lose the sum next to very large or low scores.
    """
    from moh.attention.gpu.forward_kernels import LOG2_E, combine_kernel, forward_kernel

    B, H, Nq, D = q.shape
    Hkv, Nk, Dv = v.shape[1:]
    M = rows.shape[-1]
    out = q.new_zeros(B, Nq, H, Dv)
    softmax = q.new_empty(2, B, Hkv, M, dtype=torch.float32)
    mask = _mask(attn_mask, q)
    constants = _constants(q, v, H // Hkv, is_causal, window, mask)
    splits = _splits(q, Hkv, Nk, M)
    table = tiles(max(D, Dv), q.element_size(), major_of(q.device))
    tile = table.decode if M <= DECODE_ROWS else table.forward
    # Parts of whole tiles, rounded up; below, that may leave fewer parts.
    chunk = -(-Nk // splits // tile.keys) * tile.keys if splits > 1 else Nk
    chunk = max(chunk, tile.keys)
    parts, part_softmax = out, softmax
    if splits > 1:
        splits = -(-Nk // chunk)
        parts = q.new_empty(splits, B * Hkv, M, Dv, dtype=torch.float32)
        part_softmax = q.new_empty(2, splits, B * Hkv, M, dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever the tensors are
        forward_kernel[(-(-M // tile.rows) * B * Hkv, splits)](
            q, k, v, gates, mask[0], rows, counts, parts, *part_softmax,
            *_strides(q, 0, 1, 2), *_strides(k, 0, 1, 2), *_strides(v, 0, 1, 2), *_strides(gates, 0, 1, 2), *mask[3],
            *_strides(out, 0, 1, 2), Hkv, Nk, M, window or 0, chunk, _factor(q, scale) * LOG2_E.value,
            **constants, BLOCK_M=tile.rows, BLOCK_N=tile.keys, SPLIT=splits > 1, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(B * Hkv * M,)](
                parts, *part_softmax, gates, rows, counts, out, *softmax, *_strides(gates, 0, 1, 2),
                *_strides(out, 0, 1, 2), Hkv, M, B * Hkv, splits, G=H // Hkv, DV=Dv, BDV=padded(Dv),
                BLOCK_S=padded(splits), num_warps=4,
            )  # fmt: skip
    return out, softmax


@triton_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, rows: Tensor, *_: Any) -> Any:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    return out, rows.new_empty(2, *rows.shape, dtype=torch.float32)


@torch.library.custom_op("moh::triton_attention_backward", mutates_args=())
def triton_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    rows: Tensor,
    counts: Tensor,
    before: Tensor,
    out: Tensor,
    softmax: Tensor,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (token-major in memory), k, v and gates, from `grad` with the strides of `out`."""
    from moh.attention.gpu.backward_kernels import backward_keys_kernel, backward_rows_kernel
    from moh.attention.gpu.forward_kernels import LOG2_E

    B, H, Nq, D = q.shape
    Hkv, Nk, Dv = v.shape[1:]
    M = rows.shape[-1]
    dq = q.new_zeros(B, Nq, H, D)
    dk, dv = k.new_empty(B, Hkv, Nk, D), v.new_empty(B, Hkv, Nk, Dv)
    dgates = gates.new_zeros(B, Nq, H)
    delta = torch.empty_like(softmax[0])
    mask = _mask(attn_mask, q)
    constants = _constants(q, v, H // Hkv, is_causal, window, mask)
    table = tiles(max(D, Dv), q.element_size(), major_of(q.device))
    sizes = (
        *_strides(q, 0, 1, 2), *_strides(k, 0, 1, 2), *_strides(v, 0, 1, 2), *_strides(gates, 0, 1, 2), *mask[3],
        *_strides(out, 0, 1, 2), Hkv, Nq, Nk, M, window or 0, _factor(q, scale) * LOG2_E.value, _factor(q, scale),
    )  # fmt: skip
    by_rows, by_keys = table.rows, table.keys
    with torch.cuda.device_of(q):
        backward_rows_kernel[(-(-M // by_rows.rows) * B * Hkv,)](
            grad, q, k, v, gates, mask[0], rows, counts, out, *softmax, dq, dgates, delta, *sizes, **constants,
            BLOCK_M=by_rows.rows, BLOCK_N=by_rows.keys, num_warps=by_rows.warps, num_stages=by_rows.stages,
        )  # fmt: skip
        backward_keys_kernel[(-(-Nk // by_keys.keys) * B * Hkv,)](
            grad, q, k, v, gates, mask[0], rows, counts, before, *softmax, delta, dk, dv, *sizes, **constants,
            BLOCK_M=by_keys.rows, BLOCK_N=by_keys.keys, num_warps=by_keys.warps, num_stages=by_keys.stages,
        )  # fmt: skip
    return dq.transpose(1, 2), dk, dv, dgates


@triton_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *_: Any) -> Any:
    B, H, Nq, D = q.shape
    return (
        q.new_empty(B, Nq, H, D).transpose(1, 2),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        gates.new_empty(gates.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gates, attn_mask, rows, counts, before, ctx.is_causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gates, attn_mask, rows, counts, before, *output)


def _backward(ctx: Any, grad: Tensor, grad_softmax: Tensor) -> tuple[Tensor | None, ...]:
    grads = triton_attention_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.is_causal, ctx.window, ctx.scale)
    return (*grads, *[None] * 7)


triton_attention_op.register_autograd(_backward, setup_context=_setup_context)
