# mypy: ignore-errors
"""Triton kernel of the forward pass, also for decoding: active rows are gathered by index, nothing else is read.

One program takes BLOCK_M active rows of one (sequence, key/value head) through their keys, by the online softmax that
docs/kernel.md derives. Triton compiles these functions: they have Triton's types, not Python's.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_BIAS = tl.constexpr(-2.3586341e38)  # times log2(e) it is still a finite float32


@triton.jit
def seen_and_bias(
    s, mask_ptr, token, head, offs_n, live, stride_mh, stride_mq, stride_mk, Nk, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """(scores with the bias, what may be seen), both `[rows, keys]`; scores are in units of log2."""
    seen = (offs_n < Nk)[None, :] & live[:, None]
    if CAUSAL:
        seen = seen & (offs_n[None, :] <= token[:, None])
    if WINDOW:
        seen = seen & (offs_n[None, :] > token[:, None] - window)
    if MASK != 0:
        if PER_KEY:
            m = tl.load(mask_ptr + offs_n.to(tl.int64) * stride_mk, mask=offs_n < Nk, other=0)[None, :]
        else:
            by_row = head.to(tl.int64) * stride_mh + token.to(tl.int64) * stride_mq
            at = by_row[:, None] + offs_n[None, :].to(tl.int64) * stride_mk
            m = tl.load(mask_ptr + at, mask=seen, other=0)
        if MASK == 1:
            seen = seen & (m != 0)
        else:
            # Only -inf hides a key: in units of log2 the lowest numbers would become infinite. NaN stays.
            m = m.to(tl.float32)
            s = s + tl.where((m < LOWEST_BIAS) & (m != -float("inf")), LOWEST_BIAS, m) * LOG2_E
    return s, seen


@triton.jit
def attend_keys(
    acc, total, m, q, k_ptr, v_ptr, mask_ptr, token, head, live, lo, hi, stride_kn, stride_vn, stride_mh, stride_mq,
    stride_mk, Nk, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows through the keys lo to hi; MASKED if some of them may be hidden from some row."""
    offs_d, offs_v = tl.arange(0, BD), tl.arange(0, BDV)
    for n in tl.range(lo, hi, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        at_k = offs_n[None, :].to(tl.int64) * stride_kn + offs_d[:, None]
        at_v = offs_n[:, None].to(tl.int64) * stride_vn + offs_v[None, :]
        if MASKED:
            k = tl.load(k_ptr + at_k, mask=(offs_n < Nk)[None, :] & (offs_d < D)[:, None], other=0.0)
        elif BD == D:
            k = tl.load(k_ptr + at_k)
        else:
            k = tl.load(k_ptr + at_k, mask=(offs_d < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if MASKED:
            s, seen = seen_and_bias(
                s, mask_ptr, token, head, offs_n, live, stride_mh, stride_mq, stride_mk, Nk, window,
                CAUSAL, WINDOW, MASK, PER_KEY,
            )  # fmt: skip
            s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # While a row has seen nothing its maximum is -inf; 0 in its place lets hidden keys count 2^-inf = 0, not NaN.
        shift = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(m - shift)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        if MASKED:
            v = tl.load(v_ptr + at_v, mask=(offs_n < Nk)[:, None] & (offs_v < DV)[None, :], other=0.0)
        elif BDV == DV:
            v = tl.load(v_ptr + at_v)
        else:
            v = tl.load(v_ptr + at_v, mask=(offs_v < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, total, m


@triton.jit
def packed_rows(rows_ptr, start, end, kv_head, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """A block of packed rows from `start`: (their places, which of them come before `end`, their tokens, their heads)."""
    offs_m = start + tl.arange(0, BLOCK_M)
    live = offs_m < end
    row = tl.load(rows_ptr + offs_m, mask=live, other=0)
    return offs_m, live, row // G, kv_head * G + row % G  # int32; addresses are int64


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, mask_ptr, rows_ptr, counts_ptr, out_ptr, most_ptr, total_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_on, stride_oh,
    Hkv, Nk, M, window, chunk, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    PER_KEY: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv * row blocks, splits of the keys). With SPLIT, `out`, `most`, `total` are `[splits, B*Hkv, M, ...]`."""
    # When causal, later blocks see more keys: the longest go first.
    blocks = tl.cdiv(M, BLOCK_M)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    count = tl.load(counts_ptr + bh)
    if start >= count:
        return
    b, kv_head = (bh // Hkv).to(tl.int64), bh % Hkv
    rows_ptr += bh.to(tl.int64) * M
    offs_m, live, token, head = packed_rows(rows_ptr, start, count, kv_head, G, BLOCK_M)
    token64, head64 = token.to(tl.int64), head.to(tl.int64)
    first = tl.load(rows_ptr + start) // G
    last = tl.load(rows_ptr + tl.minimum(start + BLOCK_M, count) - 1) // G

    offs_d, offs_v = tl.arange(0, BD), tl.arange(0, BDV)
    at_q = b * stride_qb + head64[:, None] * stride_qh + token64[:, None] * stride_qn + offs_d[None, :]
    q = tl.load(q_ptr + at_q, mask=live[:, None] & (offs_d < D)[None, :], other=0.0)
    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    mask_ptr += b * stride_mb

    lo, hi = 0, Nk
    if CAUSAL:
        hi = tl.minimum(last + 1, Nk)
    if WINDOW:
        lo = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        lo = tl.maximum(lo, tl.program_id(1) * chunk)
        hi = tl.minimum(hi, (tl.program_id(1) + 1) * chunk)
    acc = tl.zeros([BLOCK_M, BDV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    clear = lo  # keys lo to clear are seen by all rows
    if MASK == 0 and not WINDOW:
        clear = tl.minimum(first + 1, hi) if CAUSAL else hi
        clear = tl.maximum(clear // BLOCK_N * BLOCK_N, lo)
        acc, total, m = attend_keys(
            acc, total, m, q, k_ptr, v_ptr, mask_ptr, token, head, live, lo, clear, stride_kn, stride_vn, stride_mh,
            stride_mq, stride_mk, Nk, window, scale, D, DV, BD, BDV, BLOCK_N, False, CAUSAL, WINDOW, MASK, PER_KEY,
            PRECISION,
        )  # fmt: skip
    acc, total, m = attend_keys(
        acc, total, m, q, k_ptr, v_ptr, mask_ptr, token, head, live, clear, hi, stride_kn, stride_vn, stride_mh,
        stride_mq, stride_mk, Nk, window, scale, D, DV, BD, BDV, BLOCK_N, True, CAUSAL, WINDOW, MASK, PER_KEY,
        PRECISION,
    )  # fmt: skip

    saw_nothing = total == 0.0
    acc = acc / tl.where(saw_nothing, 1.0, total)[:, None]
    if SPLIT:
        part = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) + bh) * M + offs_m
        tl.store(most_ptr + part, m, mask=live)  # -inf where nothing was seen
        tl.store(total_ptr + part, total, mask=live)
        tl.store(out_ptr + part[:, None] * DV + offs_v[None, :], acc, mask=live[:, None] & (offs_v < DV)[None, :])
    else:
        gate = tl.load(gates_ptr + b * stride_gb + token64 * stride_gn + head64 * stride_gh, mask=live, other=0.0)
        acc = acc * gate.to(tl.float32)[:, None]
        at_o = b * stride_ob + token64[:, None] * stride_on + head64[:, None] * stride_oh + offs_v[None, :]
        tl.store(out_ptr + at_o, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (offs_v < DV)[None, :])
        # +inf makes every weight of such a row 2^-inf = 0 in the backward pass.
        at = bh.to(tl.int64) * M + offs_m
        tl.store(most_ptr + at, tl.where(saw_nothing, float("inf"), m), mask=live)
        tl.store(total_ptr + at, total, mask=live)


@triton.jit
def combine_kernel(
    parts_ptr, part_most_ptr, part_total_ptr, gates_ptr, rows_ptr, counts_ptr, out_ptr, most_ptr, total_ptr,
    stride_gb, stride_gn, stride_gh, stride_ob, stride_on, stride_oh, Hkv, M, BH, splits,
    G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv * M,): the parts of one row, weighted by their share of the softmax's sum, then by the gate."""
    place, bh = tl.program_id(0) % M, tl.program_id(0) // M
    if place >= tl.load(counts_ptr + bh):
        return
    b, kv_head = (bh // Hkv).to(tl.int64), bh % Hkv
    row = tl.load(rows_ptr + bh.to(tl.int64) * M + place)
    token64, head64 = (row // G).to(tl.int64), (kv_head * G + row % G).to(tl.int64)
    offs_s, offs_v = tl.arange(0, BLOCK_S), tl.arange(0, BDV)
    part = (offs_s.to(tl.int64) * BH + bh) * M + place
    part_most = tl.load(part_most_ptr + part, mask=offs_s < splits, other=-float("inf"))
    m = tl.max(part_most, 0)
    weight = tl.exp2(part_most - tl.where(m == -float("inf"), 0.0, m))
    weight = weight * tl.load(part_total_ptr + part, mask=offs_s < splits, other=0.0)
    total = tl.sum(weight, 0)
    saw_nothing = total == 0.0
    used = (weight > 0)[:, None] & (offs_v < DV)[None, :]
    parts = tl.load(parts_ptr + part[:, None] * DV + offs_v[None, :], mask=used, other=0.0)
    gate = tl.load(gates_ptr + b * stride_gb + token64 * stride_gn + head64 * stride_gh).to(tl.float32)
    out = tl.sum(parts * weight[:, None], 0) * (gate / tl.where(saw_nothing, 1.0, total))
    at_o = b * stride_ob + token64 * stride_on + head64 * stride_oh + offs_v
    tl.store(out_ptr + at_o, out.to(out_ptr.dtype.element_ty), mask=offs_v < DV)
    tl.store(most_ptr + bh.to(tl.int64) * M + place, tl.where(saw_nothing, float("inf"), m))
    tl.store(total_ptr + bh.to(tl.int64) * M + place, total)
