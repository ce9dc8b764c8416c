"""What stands in for skipped tiles, on a GPU: the summary of k and v, and how a row takes it in. See `pooled.py`."""

from __future__ import annotations

import triton
import triton.language as tl

STAND_INS = tl.constexpr(32)
"""Stand-ins that a program takes in at once: those of one mask word."""


@triton.jit
def _sum_over_chunk(k_base, other_base, means_ptr, stride_kn, stride_other, first_tile, end_tile, seqlen,
                    TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
                    PRECISION: tl.constexpr):
    """Sum of (k - mean)(other - mean).T over the tiles of a chunk; the means of other go to `means`, [KT, D]."""
    offs_d = tl.arange(0, D_PADDED)
    in_d = offs_d < D
    total = tl.zeros([D_PADDED, D_PADDED], tl.float32)
    for tile in tl.range(first_tile, end_tile):
        n_keys = tl.minimum(seqlen - tile * TILE, TILE)
        start = tl.cast(tile * TILE, tl.int64)
        k_tile = k_base + start * stride_kn
        other_tile = other_base + start * stride_other
        k_mean = tl.zeros([D_PADDED], tl.float32)
        other_mean = tl.zeros([D_PADDED], tl.float32)
        for first in range(0, TILE, ROWS):
            offs = first + tl.arange(0, ROWS)
            inside = (offs < n_keys)[:, None] & in_d[None, :]
            k = tl.load(k_tile + offs[:, None] * stride_kn + offs_d[None, :], mask=inside, other=0.0)
            other = tl.load(other_tile + offs[:, None] * stride_other + offs_d[None, :], mask=inside, other=0.0)
            k_mean += tl.sum(k.to(tl.float32), 0)
            other_mean += tl.sum(other.to(tl.float32), 0)
        k_mean = k_mean / n_keys
        other_mean = other_mean / n_keys
        tl.store(means_ptr + tile * D + offs_d, other_mean.to(means_ptr.dtype.element_ty), mask=in_d)
        for first in range(0, TILE, ROWS):
            offs = first + tl.arange(0, ROWS)
            inside = (offs < n_keys)[:, None] & in_d[None, :]
            k = tl.load(k_tile + offs[:, None] * stride_kn + offs_d[None, :], mask=inside, other=0.0)
            other = tl.load(other_tile + offs[:, None] * stride_other + offs_d[None, :], mask=inside, other=0.0)
            dk = tl.where(inside, k.to(tl.float32) - k_mean[None, :], 0.0).to(k.dtype)
            d_other = tl.where(inside, other.to(tl.float32) - other_mean[None, :], 0.0).to(k.dtype)
            total = tl.dot(tl.trans(dk), d_other, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["n_heads", "seqlen", "n_tiles", "n_chunks", "chunk_tiles"])
def summary_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, moments_ptr, stride_kb, stride_kh, stride_kn,
                   stride_vb, stride_vh, stride_vn, n_heads, seqlen, n_tiles, n_chunks, chunk_tiles,
                   TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One program per (batch row, head, chunk of tiles, moment).

    k, v: [B, H, N, D]. keys, values: [B*H, KT, D], means of each tile, in the dtype of k. moments: float32
    [B*H, n_chunks, 2, D, D], for moment 0 the sum over the chunk of (k - mean)(v - mean).T, for moment 1 of
    (k - mean)(k - mean).T. Moment 0 also writes `values`, moment 1 `keys`. Sums are in a fixed order. Batch, head and
    tile offsets are int64; offsets within a tile are int32.
    """
    pid = tl.program_id(0)
    moment = pid % 2
    chunk = (pid // 2) % n_chunks
    batch_head = pid // (2 * n_chunks)
    batch = (batch_head // n_heads).to(tl.int64)
    head = (batch_head % n_heads).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + head * stride_kh
    means = batch_head.to(tl.int64) * n_tiles * D
    first_tile = chunk * chunk_tiles
    end_tile = tl.minimum(first_tile + chunk_tiles, n_tiles)
    # A call in each branch and not a pointer chosen by it: Triton's passes for AMD stop at such a pointer
    # (triton-lang/triton#9541), and still do where only one of the tensors is below 2 GB (#9859).
    if moment == 0:
        total = _sum_over_chunk(k_base, v_ptr + batch * stride_vb + head * stride_vh, values_ptr + means, stride_kn,
                                stride_vn, first_tile, end_tile, seqlen, TILE, ROWS, D, D_PADDED, PRECISION)
    else:
        total = _sum_over_chunk(k_base, k_base, keys_ptr + means, stride_kn, stride_kn, first_tile, end_tile, seqlen,
                                TILE, ROWS, D, D_PADDED, PRECISION)
    offs_d = tl.arange(0, D_PADDED)
    in_d = offs_d < D
    out_ptr = moments_ptr + pid.to(tl.int64) // 2 * (2 * D * D) + moment * (D * D)
    tl.store(out_ptr + offs_d[:, None] * D + offs_d[None, :], total, mask=in_d[:, None] & in_d[None, :])


@triton.jit
def score_variance(q_rows, spread_ptr, spread_scale, BLOCK_M: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Variance of each row's scores inside tiles, natural units.

    q_rows: pointers [BLOCK_M]. spread: [D, D], its dtype is that of the products. spread_scale includes sm_scale^2.
    """
    # In parts of 32 channels, q read again for each: whole rows of q and S would spill.
    offs = tl.arange(0, 32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for column in tl.range(0, D, 32, num_stages=1):
        products = tl.zeros([BLOCK_M, 32], tl.float32)
        for row in tl.range(0, D, 32, num_stages=1):
            q = tl.load(q_rows[:, None] + row + offs[None, :]).to(spread_ptr.dtype.element_ty)
            spread = tl.load(spread_ptr + (row + offs)[:, None] * D + column + offs[None, :])
            products = tl.dot(q, spread, products, input_precision=PRECISION)
        total += tl.sum(products * tl.load(q_rows[:, None] + column + offs[None, :]).to(tl.float32), 1)
    total = total * spread_scale
    return tl.where(total < 0.0, 0.0, total)  # NaN stays


@triton.jit
def raised_threshold(threshold, variance, MASS: tl.constexpr, STAKE_MIN: tl.constexpr, RAISED_MAX: tl.constexpr):
    """`raised` of `pooled.py`; log2, or with MASS the share itself."""
    stake = 1.0 - tl.math.exp2(variance * -1.4426950408889634)
    stake = tl.where(stake < STAKE_MIN, STAKE_MIN, stake)  # NaN stays
    if MASS:
        value = threshold / stake
        limit = tl.maximum(threshold, RAISED_MAX)
    else:
        value = threshold - tl.math.log2(stake)
        limit = tl.maximum(threshold, tl.math.log2(RAISED_MAX))
    return tl.where(value > limit, limit, value)


@triton.jit
def add_stand_ins(q, q_tail, q_rows, acc, acc_tail, m_i, l_i, variance, words_ptr, keys_ptr, values_ptr, shift_ptr,
                  shift_scale, sm_scale, qk_scale, n_words, k_tiles, seqlen_k, TILE: tl.constexpr, D_MAIN: tl.constexpr,
                  D_TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Take in the stand-ins of the tiles whose bit in `words` is 0: running sums of one query tile, as in `_weigh`.

    words_ptr: n_words mask words as this call has read them; 0 words do nothing. keys, values: [KT, D] of the head.
    shift: [D, D], in units of shift_scale.
    """
    D: tl.constexpr = D_MAIN + D_TAIL
    offs_d = tl.arange(0, D_MAIN)
    offs_t = D_MAIN + tl.arange(0, D_TAIL if D_TAIL else 1)
    offs = tl.arange(0, STAND_INS)
    added = tl.zeros_like(l_i)
    for i in tl.range(0, n_words, num_stages=1):
        tile = i * STAND_INS + offs
        known = tile < k_tiles
        skipped = (((tl.load(words_ptr + i) >> offs) & 1) == 0) & known
        n_keys = tl.minimum(tl.maximum(seqlen_k - tile * TILE, 1), TILE)
        k = tl.load(keys_ptr + tile[None, :] * D + offs_d[:, None], mask=known[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION)
        if D_TAIL:
            k_tail = tl.load(keys_ptr + tile[None, :] * D + offs_t[:, None], mask=known[None, :], other=0.0)
            s = tl.dot(q_tail, k_tail, s, input_precision=PRECISION)
        s = tl.where(skipped[None, :], s * qk_scale + tl.math.log2(n_keys.to(tl.float32))[None, :], -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.math.exp2(s - m_safe[:, None])
        alpha = tl.math.exp2(m_i - m_safe)
        added = added * alpha + tl.sum(p, 1)
        l_i = l_i * alpha + tl.sum(p, 1)
        # A stand-in that is not needed has weight 0, but 0 * NaN is NaN.
        v = tl.load(values_ptr + tile[:, None] * D + offs_d[None, :], mask=skipped[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        if D_TAIL:
            v_tail = tl.load(values_ptr + tile[:, None] * D + offs_t[None, :], mask=skipped[:, None], other=0.0)
            acc_tail = tl.dot(p.to(v.dtype), v_tail, acc_tail * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    if n_words > 0:
        # The products go right into the accumulator: a second one of its size would spill. For that it is brought to
        # the unit of the matrix, and the weights, at most 1 then, go into q.
        unit = l_i * shift_scale
        weight = added / l_i * tl.math.exp2(variance * -0.7213475204444817) * sm_scale  # exp(-variance / 2)
        acc = acc / unit[:, None]
        if D_TAIL:
            acc_tail = acc_tail / unit[:, None]
        for row in tl.range(0, D, 32, num_stages=1):
            part = tl.load(q_rows[:, None] + row + offs[None, :]).to(tl.float32) * weight[:, None]
            part = part.to(shift_ptr.dtype.element_ty)
            matrix_rows = shift_ptr + (row + offs)[:, None] * D
            acc = tl.dot(part, tl.load(matrix_rows + offs_d[None, :]), acc, input_precision=PRECISION)
            if D_TAIL:
                acc_tail = tl.dot(part, tl.load(matrix_rows + offs_t[None, :]), acc_tail, input_precision=PRECISION)
        acc = acc * unit[:, None]
        if D_TAIL:
            acc_tail = acc_tail * unit[:, None]
    return acc, acc_tail, m_i, l_i
