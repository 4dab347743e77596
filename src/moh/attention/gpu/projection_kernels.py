# mypy: ignore-errors
"""Triton kernels that project active (token, head) pairs alone, with M `[H * D, C]` the weights of all heads.

`expand`: `heads[t, h] = M[h] x[t]`; `outer`: `M[h] = sum of heads[t, h] x[t]' over h's tokens`; both take each head's active
tokens from a packed list. `sum_heads`: `x[t] = sum_h M[h]' heads[t, h]` for few tokens. No atomics: same inputs, same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_active(
    gates_ptr, stride_gt, stride_gh, start, T, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """1 for the active pairs of a block of tokens, 0 for all others, also outside of T and H, int32."""
    token, offs_h = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    mask = (token < T)[:, None] & (offs_h < H)[None, :]
    at_g = token[:, None].to(tl.int64) * stride_gt + offs_h[None, :].to(tl.int64) * stride_gh
    return (tl.load(gates_ptr + at_g, mask=mask, other=0.0) != 0).to(tl.int32)


@triton.jit
def count_kernel(
    gates_ptr, parts_ptr, stride_gt, stride_gh, T, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks,): `parts` `[blocks, H]`, each head's active tokens of the block."""
    active = load_active(gates_ptr, stride_gt, stride_gh, tl.program_id(0) * BLOCK_T, T, H, BLOCK_H, BLOCK_T)
    offs_h = tl.arange(0, BLOCK_H)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * H + offs_h, tl.sum(active, 0), mask=offs_h < H)


@triton.jit
def pack_kernel(
    gates_ptr, parts_ptr, rows_ptr, counts_ptr, stride_gt, stride_gh, T,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks,): `rows` `[H, T]`, each head's active tokens, then the others; `counts` `[H]` of the active.

    Every program adds up `parts` for itself: two launches in all, where prefix sums by PyTorch take ten.
    """
    block, offs_h = tl.program_id(0), tl.arange(0, BLOCK_H)
    start = block * BLOCK_T
    total, before = tl.zeros([BLOCK_H], tl.int32), tl.zeros([BLOCK_H], tl.int32)
    for b in tl.range(0, tl.cdiv(T, BLOCK_T), BLOCK_T):
        offs_b = (b + tl.arange(0, BLOCK_T))[:, None]
        mask = (offs_b < tl.cdiv(T, BLOCK_T)) & (offs_h < H)[None, :]
        part = tl.load(parts_ptr + offs_b.to(tl.int64) * H + offs_h[None, :], mask=mask, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where(offs_b < block, part, 0), 0)
    active = load_active(gates_ptr, stride_gt, stride_gh, start, T, H, BLOCK_H, BLOCK_T)
    token = start + tl.arange(0, BLOCK_T)
    upto = tl.cumsum(active, 0) + before[None, :]  # itself included; inactive tokens go behind the active ones
    place = tl.where(active != 0, upto - 1, total[None, :] + token[:, None] - upto)
    mask = (token < T)[:, None] & (offs_h < H)[None, :]
    tl.store(rows_ptr + offs_h[None, :].to(tl.int64) * T + place, token[:, None], mask=mask)
    if block == 0:
        tl.store(counts_ptr + offs_h, total, mask=offs_h < H)


@triton.jit
def expand_kernel(
    x_ptr, matrix_ptr, gates_ptr, rows_ptr, counts_ptr, out_ptr, stride_xt, stride_mr, stride_mc, stride_gt, stride_gh,
    T, C,
    H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks * H * slices of D,): `out` `[T, H, D]`, contiguous and written whole, 0 where inactive.

    Heads follow each other, so that programs that run at once read the same tokens. PACKED: blocks are of each head's
    list, its active tokens first; else of all tokens. WHOLE: C and D are multiples of their blocks.
    """
    slices: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    head = tl.program_id(0) // slices % H
    offs_d = tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.program_id(0) // (slices * H) * BLOCK_M
    offs_m, offs_c = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    inside = offs_m < T
    if PACKED:
        count = tl.load(counts_ptr + head)
        live = offs_m < count
        token = tl.load(rows_ptr + head.to(tl.int64) * T + offs_m, mask=inside, other=0).to(tl.int64)
        hi = tl.where(start < count, C, 0)
    else:
        token = tl.where(inside, offs_m, 0).to(tl.int64)
        gate = tl.load(gates_ptr + token * stride_gt + head.to(tl.int64) * stride_gh, mask=inside, other=0.0)
        live = gate != 0
        hi = tl.where(tl.max(live.to(tl.int32), 0) > 0, C, 0)  # weights of unused heads are not read
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row = (head * D + offs_d).to(tl.int64)
    for c in tl.range(0, hi, BLOCK_C):
        at_c = c + offs_c
        at_x = token[:, None] * stride_xt + at_c[None, :]
        at_m = row[None, :] * stride_mr + at_c[:, None].to(tl.int64) * stride_mc
        if WHOLE:  # rows that are not live hold other tokens, whose products are dropped
            x = tl.load(x_ptr + at_x)
            m = tl.load(matrix_ptr + at_m)
        else:
            x = tl.load(x_ptr + at_x, mask=(at_c < C)[None, :], other=0.0)
            m = tl.load(matrix_ptr + at_m, mask=(at_c < C)[:, None] & (offs_d < D)[None, :], other=0.0)
        acc = tl.dot(x, m, acc, input_precision=PRECISION)
    acc = tl.where(live[:, None], acc, 0.0)
    at_o = (token * H + head)[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + at_o, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < D)[None, :])


@triton.jit
def add_outer(
    acc, heads_ptr, x_ptr, rows_ptr, lo, hi, offs_d, offs_c, stride_ht, stride_xt, C,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The packed tokens lo to hi, a multiple of BLOCK_M of them unless TAIL."""
    for start in tl.range(lo, hi, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        token = tl.load(rows_ptr + offs_m, mask=offs_m < hi, other=0) if TAIL else tl.load(rows_ptr + offs_m)
        token = token.to(tl.int64)
        at_h, at_x = token[:, None] * stride_ht + offs_d[None, :], token[:, None] * stride_xt + offs_c[None, :]
        if TAIL or not WHOLE:
            live = (offs_m < hi)[:, None]
            h = tl.load(heads_ptr + at_h, mask=live & (offs_d < D)[None, :], other=0.0)
            x = tl.load(x_ptr + at_x, mask=live & (offs_c < C)[None, :], other=0.0)
        else:
            h = tl.load(heads_ptr + at_h)
            x = tl.load(x_ptr + at_x)
        acc = tl.dot(tl.trans(h), x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def outer_kernel(
    heads_ptr, x_ptr, rows_ptr, counts_ptr, out_ptr, stride_ht, stride_hh, stride_xt, stride_or, stride_oc, T, C,
    H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of C * H * slices of D,): `out` `[H * D, C]`, written whole; tokens are added in their order."""
    slices: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    head = tl.program_id(0) // slices % H
    offs_d = tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = tl.program_id(0) // (slices * H) * BLOCK_C + tl.arange(0, BLOCK_C)
    heads_ptr += head.to(tl.int64) * stride_hh
    rows_ptr += head.to(tl.int64) * T
    count = tl.load(counts_ptr + head)
    full = count // BLOCK_M * BLOCK_M
    acc = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    acc = add_outer(
        acc, heads_ptr, x_ptr, rows_ptr, 0, full, offs_d, offs_c, stride_ht, stride_xt, C, D, BLOCK_M, False, WHOLE,
        PRECISION,
    )  # fmt: skip
    acc = add_outer(
        acc, heads_ptr, x_ptr, rows_ptr, full, count, offs_d, offs_c, stride_ht, stride_xt, C, D, BLOCK_M, True, WHOLE,
        PRECISION,
    )  # fmt: skip
    at_o = (head * D + offs_d).to(tl.int64)[:, None] * stride_or + offs_c.to(tl.int64)[None, :] * stride_oc
    mask = (offs_d < D)[:, None] & (offs_c < C)[None, :]
    tl.store(out_ptr + at_o, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_heads_kernel(
    heads_ptr, matrix_ptr, gates_ptr, parts_ptr, stride_ht, stride_hh, stride_mr, stride_mc, stride_gt, stride_gh, T, C,
    H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks * blocks of C * H,): `parts` `[H, T, C]`, float32, of the active pairs; others stay unwritten."""
    head = tl.program_id(0) % H
    blocks = tl.cdiv(C, BLOCK_C)
    offs_t = tl.program_id(0) // (H * blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(0) // H % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    token = offs_t.to(tl.int64)
    gate = tl.load(gates_ptr + token * stride_gt + head.to(tl.int64) * stride_gh, mask=offs_t < T, other=0.0)
    live = gate != 0
    if tl.max(live.to(tl.int32), 0) == 0:
        return  # weights of unused heads are not read
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        at_h = token[:, None] * stride_ht + head.to(tl.int64) * stride_hh + offs_d[None, :]
        at_m = (head * D + offs_d).to(tl.int64)[:, None] * stride_mr + offs_c.to(tl.int64)[None, :] * stride_mc
        h = tl.load(heads_ptr + at_h, mask=live[:, None] & (offs_d < D)[None, :], other=0.0)
        m = tl.load(matrix_ptr + at_m, mask=(offs_d < D)[:, None] & (offs_c < C)[None, :], other=0.0)
        acc = tl.dot(h, m, acc, input_precision=PRECISION)
    at_p = (head.to(tl.int64) * T + token)[:, None] * C + offs_c[None, :]
    tl.store(parts_ptr + at_p, acc, mask=live[:, None] & (offs_c < C)[None, :])


@triton.jit
def add_parts_kernel(
    parts_ptr, gates_ptr, out_ptr, stride_gt, stride_gh, T, C,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (T * blocks of C,): the sum of a token's active heads, `out` `[T, C]`, contiguous."""
    blocks = tl.cdiv(C, BLOCK_C)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)
    gate = tl.load(gates_ptr + token * stride_gt + offs_h * stride_gh, mask=offs_h < H, other=0.0)
    at_p = (offs_h * T + token)[:, None] * C + offs_c[None, :]
    parts = tl.load(parts_ptr + at_p, mask=(gate != 0)[:, None] & (offs_c < C)[None, :], other=0.0)
    tl.store(out_ptr + token * C + offs_c, tl.sum(parts, 0).to(out_ptr.dtype.element_ty), mask=offs_c < C)
