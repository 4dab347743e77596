# mypy: ignore-errors
"""Triton kernels of the backward pass: queries' and gates' gradients by rows, then keys' and values' by keys.

With h the unweighted head, `out = g h`: `dg = dout . h = sum of p (dout . v)` and `ds = p (g (dout . v) - dout . out)`;
weights p are recomputed from the scores, and the largest of a row's and the sum of `2^(s - largest)` that the forward pass
has kept. Everything is linear in p, so that sum divides a row's gate, delta and dg instead. No atomics: the same inputs give
the same gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moh.attention.gpu.forward_kernels import packed_rows, seen_and_bias


@triton.jit
def query_range(
    dq, dg, q, dout, most, delta, gate, k_ptr, v_ptr, mask_ptr, token, head, live, lo, hi, stride_kn, stride_vn, stride_mh,
    stride_mq, stride_mk, Nk, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows' queries, without the factor of the scores, and of their gates, from the keys lo to hi."""
    offs_d, offs_v = tl.arange(0, BD), tl.arange(0, BDV)
    for n in tl.range(lo, hi, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = offs_n < Nk
        at_k = offs_n[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
        at_v = offs_n[None, :].to(tl.int64) * stride_vn + offs_v[:, None]
        k = tl.load(k_ptr + at_k, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
        v = tl.load(v_ptr + at_v, mask=inside[None, :] & (offs_v < DV)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            s, seen = seen_and_bias(
                s, mask_ptr, token, head, offs_n, live, stride_mh, stride_mq, stride_mk, Nk, window,
                CAUSAL, WINDOW, MASK, PER_KEY,
            )  # fmt: skip
            p = tl.exp2(tl.where(seen, s - most[:, None], -float("inf")))
        else:
            p = tl.exp2(s - most[:, None])
        dp = tl.dot(dout, v, input_precision=PRECISION)
        dg += tl.sum(p * dp, 1)
        ds = p * (dp * gate[:, None] - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dg


@triton.jit
def backward_rows_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, gates_ptr, mask_ptr, rows_ptr, counts_ptr, out_ptr, most_ptr, total_ptr,
    dq_ptr, dgates_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_on, stride_oh,
    Hkv, Nq, Nk, M, window, scale, factor,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv * row blocks,): gradients of queries and gates, and `delta = dout . out / total` for the keys' kernel.

    `dout` has the strides of `out`, `dq` is `[B, Nq, H, D]` and `dgates` `[B, Nq, H]`, both contiguous. `scale` is
    `factor * log2(e)`, as scores are in units of log2.
    """
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
    at_o = b * stride_ob + token64[:, None] * stride_on + head64[:, None] * stride_oh + offs_v[None, :]
    in_q, in_o = live[:, None] & (offs_d < D)[None, :], live[:, None] & (offs_v < DV)[None, :]
    q = tl.load(q_ptr + at_q, mask=in_q, other=0.0)
    dout = tl.load(dout_ptr + at_o, mask=in_o, other=0.0)
    out = tl.load(out_ptr + at_o, mask=in_o, other=0.0)
    most = tl.load(most_ptr + bh.to(tl.int64) * M + offs_m, mask=live, other=float("inf"))
    total = tl.load(total_ptr + bh.to(tl.int64) * M + offs_m, mask=live, other=1.0)
    part = 1.0 / tl.where(total == 0.0, 1.0, total)
    gate = tl.load(gates_ptr + b * stride_gb + token64 * stride_gn + head64 * stride_gh, mask=live, other=0.0)
    gate = gate.to(tl.float32) * part
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) * part
    tl.store(delta_ptr + bh.to(tl.int64) * M + offs_m, delta, mask=live)
    pair = (b * Nq + token64) * (Hkv * G) + head  # of [B, Nq, H]

    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    mask_ptr += b * stride_mb
    lo, hi = 0, Nk
    if CAUSAL:
        hi = tl.minimum(last + 1, Nk)
    if WINDOW:
        lo = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BD], tl.float32)
    dg = tl.zeros([BLOCK_M], tl.float32)  # not delta / gate: a small gate leaves little of the head in a rounded output
    clear = lo
    if MASK == 0 and not WINDOW:
        clear = tl.minimum(first + 1, hi) if CAUSAL else hi
        clear = clear // BLOCK_N * BLOCK_N
        dq, dg = query_range(
            dq, dg, q, dout, most, delta, gate, k_ptr, v_ptr, mask_ptr, token, head, live, lo, clear, stride_kn, stride_vn,
            stride_mh, stride_mq, stride_mk, Nk, window, scale, D, DV, BD, BDV, BLOCK_N, False, CAUSAL, WINDOW, MASK,
            PER_KEY, PRECISION,
        )  # fmt: skip
    dq, dg = query_range(
        dq, dg, q, dout, most, delta, gate, k_ptr, v_ptr, mask_ptr, token, head, live, clear, hi, stride_kn, stride_vn,
        stride_mh, stride_mq, stride_mk, Nk, window, scale, D, DV, BD, BDV, BLOCK_N, True, CAUSAL, WINDOW, MASK,
        PER_KEY, PRECISION,
    )  # fmt: skip
    tl.store(dgates_ptr + pair, (dg * part).to(dgates_ptr.dtype.element_ty), mask=live)
    tl.store(dq_ptr + pair[:, None] * D + offs_d[None, :], (dq * factor).to(dq_ptr.dtype.element_ty), mask=in_q)


@triton.jit
def key_range(
    dk, dv, k, v, q_ptr, dout_ptr, gates_ptr, mask_ptr, rows_ptr, most_ptr, total_ptr, delta_ptr, kv_head, offs_n, lo, hi,
    stride_qh, stride_qn, stride_gn, stride_gh, stride_mh, stride_mq, stride_mk, stride_on, stride_oh, Nk, window,
    scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values from the active rows lo to hi."""
    offs_d, offs_v = tl.arange(0, BD), tl.arange(0, BDV)
    for start in tl.range(lo, hi, BLOCK_M):
        offs_m, live, token, head = packed_rows(rows_ptr, start, hi, kv_head, G, BLOCK_M)
        token64, head64 = token.to(tl.int64), head.to(tl.int64)
        at_q = head64[:, None] * stride_qh + token64[:, None] * stride_qn + offs_d[None, :]
        at_o = token64[:, None] * stride_on + head64[:, None] * stride_oh + offs_v[None, :]
        q = tl.load(q_ptr + at_q, mask=live[:, None] & (offs_d < D)[None, :], other=0.0)
        dout = tl.load(dout_ptr + at_o, mask=live[:, None] & (offs_v < DV)[None, :], other=0.0)
        most = tl.load(most_ptr + offs_m, mask=live, other=float("inf"))  # so that rows past the end weigh 0
        total = tl.load(total_ptr + offs_m, mask=live, other=1.0)
        delta = tl.load(delta_ptr + offs_m, mask=live, other=0.0)
        gate = tl.load(gates_ptr + token64 * stride_gn + head64 * stride_gh, mask=live, other=0.0).to(tl.float32)
        gate = gate / tl.where(total == 0.0, 1.0, total)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            s, seen = seen_and_bias(
                s, mask_ptr, token, head, offs_n, live, stride_mh, stride_mq, stride_mk, Nk, window,
                CAUSAL, WINDOW, MASK, PER_KEY,
            )  # fmt: skip
            p = tl.exp2(tl.where(seen, s - most[:, None], -float("inf")))
        else:
            p = tl.exp2(s - most[:, None])
        weight = (p * gate[:, None]).to(dout.dtype)
        dv = tl.dot(tl.trans(weight), dout, dv, input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp * gate[:, None] - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_keys_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, gates_ptr, mask_ptr, rows_ptr, counts_ptr, before_ptr, most_ptr, total_ptr,
    delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_on, stride_oh,
    Hkv, Nq, Nk, M, window, scale, factor,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv * key blocks,): `dk` `[B, Hkv, Nk, D]` and `dv` `[B, Hkv, Nk, DV]`, contiguous and written whole."""
    blocks = tl.cdiv(Nk, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N  # the first keys are seen by most rows when causal: they start first
    bh = tl.program_id(0) // blocks
    b, kv_head = (bh // Hkv).to(tl.int64), bh % Hkv
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, BD), tl.arange(0, BDV)
    in_k, in_v = (offs_n < Nk)[:, None] & (offs_d < D)[None, :], (offs_n < Nk)[:, None] & (offs_v < DV)[None, :]
    at_k = b * stride_kb + kv_head.to(tl.int64) * stride_kh + offs_n[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
    at_v = b * stride_vb + kv_head.to(tl.int64) * stride_vh + offs_n[:, None].to(tl.int64) * stride_vn + offs_v[None, :]
    k = tl.load(k_ptr + at_k, mask=in_k, other=0.0)
    v = tl.load(v_ptr + at_v, mask=in_v, other=0.0)

    before_ptr += bh.to(tl.int64) * (Nq + 1)
    hi = tl.load(counts_ptr + bh)
    lo = hi * 0
    if CAUSAL:
        lo = tl.load(before_ptr + tl.minimum(n, Nq))  # earlier tokens see no key of the block
    if WINDOW:
        hi = tl.load(before_ptr + tl.minimum(n + BLOCK_N - 1 + window, Nq))  # nor do tokens a window past its last key
    q_ptr += b * stride_qb
    dout_ptr += b * stride_ob
    gates_ptr += b * stride_gb
    mask_ptr += b * stride_mb
    rows_ptr += bh.to(tl.int64) * M
    most_ptr += bh.to(tl.int64) * M
    total_ptr += bh.to(tl.int64) * M
    delta_ptr += bh.to(tl.int64) * M
    dk, dv = tl.zeros([BLOCK_N, BD], tl.float32), tl.zeros([BLOCK_N, BDV], tl.float32)
    clear = hi  # rows from here on see all keys of the block
    if MASK == 0 and not WINDOW:
        clear = tl.load(before_ptr + tl.minimum(n + BLOCK_N - 1, Nq)) if CAUSAL else lo
    dk, dv = key_range(
        dk, dv, k, v, q_ptr, dout_ptr, gates_ptr, mask_ptr, rows_ptr, most_ptr, total_ptr, delta_ptr, kv_head, offs_n, lo, clear,
        stride_qh, stride_qn, stride_gn, stride_gh, stride_mh, stride_mq, stride_mk, stride_on, stride_oh, Nk, window,
        scale, G, D, DV, BD, BDV, BLOCK_M, True, CAUSAL, WINDOW, MASK, PER_KEY, PRECISION,
    )  # fmt: skip
    if MASK == 0 and not WINDOW:
        dk, dv = key_range(
            dk, dv, k, v, q_ptr, dout_ptr, gates_ptr, mask_ptr, rows_ptr, most_ptr, total_ptr, delta_ptr, kv_head, offs_n, clear,
            hi, stride_qh, stride_qn, stride_gn, stride_gh, stride_mh, stride_mq, stride_mk, stride_on, stride_oh, Nk,
            window, scale, G, D, DV, BD, BDV, BLOCK_M, False, CAUSAL, WINDOW, MASK, PER_KEY, PRECISION,
        )  # fmt: skip
    at = (bh.to(tl.int64) * Nk + offs_n)[:, None]
    tl.store(dk_ptr + at * D + offs_d[None, :], (dk * factor).to(dk_ptr.dtype.element_ty), mask=in_k)
    tl.store(dv_ptr + at * DV + offs_v[None, :], dv.to(dv_ptr.dtype.element_ty), mask=in_v)
