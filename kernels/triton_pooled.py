"""Pooled keys and values on a GPU: made of k and v, and each query row's attention over those of its skipped tiles."""

from __future__ import annotations

import triton
import triton.language as tl

_POOLED = tl.constexpr(32)
"""Pooled keys that a program attends to at once: those of one mask word."""


@triton.jit
def _sum_over_chunk(k_base, other_base, means_ptr, stride_kn, stride_other, first_tile, end_tile, seqlen,
                    TILE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
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
        for first in range(0, TILE, BLOCK_N):
            offs = first + tl.arange(0, BLOCK_N)
            inside = (offs < n_keys)[:, None] & in_d[None, :]
            k = tl.load(k_tile + offs[:, None] * stride_kn + offs_d[None, :], mask=inside, other=0.0)
            other = tl.load(other_tile + offs[:, None] * stride_other + offs_d[None, :], mask=inside, other=0.0)
            k_mean += tl.sum(k.to(tl.float32), 0)
            other_mean += tl.sum(other.to(tl.float32), 0)
        k_mean = k_mean / n_keys
        other_mean = other_mean / n_keys
        tl.store(means_ptr + tile * D + offs_d, other_mean.to(means_ptr.dtype.element_ty), mask=in_d)
        for first in range(0, TILE, BLOCK_N):
            offs = first + tl.arange(0, BLOCK_N)
            inside = (offs < n_keys)[:, None] & in_d[None, :]
            k = tl.load(k_tile + offs[:, None] * stride_kn + offs_d[None, :], mask=inside, other=0.0)
            other = tl.load(other_tile + offs[:, None] * stride_other + offs_d[None, :], mask=inside, other=0.0)
            dk = tl.where(inside, k.to(tl.float32) - k_mean[None, :], 0.0).to(k.dtype)
            d_other = tl.where(inside, other.to(tl.float32) - other_mean[None, :], 0.0).to(k.dtype)
            total = tl.dot(tl.trans(dk), d_other, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["n_heads", "seqlen", "n_tiles", "n_chunks", "chunk_tiles"])
def pool_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, moments_ptr, stride_kb, stride_kh, stride_kn,
                stride_vb, stride_vh, stride_vn, n_heads, seqlen, n_tiles, n_chunks, chunk_tiles,
                TILE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
                PRECISION: tl.constexpr):
    """One program per (batch entry, head, chunk of tiles, moment).

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
                                stride_vn, first_tile, end_tile, seqlen, TILE, BLOCK_N, D, D_PADDED, PRECISION)
    else:
        total = _sum_over_chunk(k_base, k_base, keys_ptr + means, stride_kn, stride_kn, first_tile, end_tile, seqlen,
                                TILE, BLOCK_N, D, D_PADDED, PRECISION)
    offs_d = tl.arange(0, D_PADDED)
    in_d = offs_d < D
    out_ptr = moments_ptr + pid.to(tl.int64) // 2 * (2 * D * D) + moment * (D * D)
    tl.store(out_ptr + offs_d[:, None] * D + offs_d[None, :], total, mask=in_d[:, None] & in_d[None, :])


@triton.jit
def _score_variance(q_rows, spread_ptr, spread_scale, BLOCK_M: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Variance of each row's scores inside tiles, natural units.

    q_rows: pointers [BLOCK_M]. spread: [D, D], its dtype is that of the products. spread_scale includes sm_scale^2.
    """
    # In parts of 32 channels, q read again for each: whole rows of q and S would spill.
    offs = tl.arange(0, 32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for column in tl.range(0, D, 32, num_stages=1):
        products = tl.zeros([BLOCK_M, 32], tl.float32)
        for channel in tl.range(0, D, 32, num_stages=1):
            q = tl.load(q_rows[:, None] + channel + offs[None, :]).to(spread_ptr.dtype.element_ty)
            spread = tl.load(spread_ptr + (channel + offs)[:, None] * D + column + offs[None, :])
            products = tl.dot(q, spread, products, input_precision=PRECISION)
        total += tl.sum(products * tl.load(q_rows[:, None] + column + offs[None, :]).to(tl.float32), 1)
    total = total * spread_scale
    return tl.where(total < 0.0, 0.0, total)  # NaN stays


@triton.jit
def _raised_threshold(threshold, variance, MASS: tl.constexpr, LOST_MIN: tl.constexpr, RAISED_MAX: tl.constexpr):
    """`raised` of `pooled.py`; log2, or with MASS the share itself."""
    lost = 1.0 - tl.math.exp2(variance * -1.4426950408889634)
    lost = tl.where(lost < LOST_MIN, LOST_MIN, lost)  # NaN stays
    if MASS:
        value = threshold / lost
        limit = tl.maximum(threshold, RAISED_MAX)
    else:
        value = threshold - tl.math.log2(lost)
        limit = tl.maximum(threshold, tl.math.log2(RAISED_MAX))
    return tl.where(value > limit, limit, value)


@triton.jit(do_not_specialize=["sm_scale", "threshold", "n_heads", "seqlen_q", "seqlen_k"])
def pooled_attention_kernel(q_ptr, out_ptr, masks_ptr, keys_ptr, values_ptr, moments_ptr, moment_scale_ptr,
                            row_threshold_ptr, pooled_lse_ptr, stride_qb, stride_qh, stride_qn, stride_ob, stride_oh,
                            stride_on, sm_scale, threshold, n_heads, seqlen_q, seqlen_k,
                            TILE: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
                            MASS: tl.constexpr, LOST_MIN: tl.constexpr, RAISED_MAX: tl.constexpr,
                            PRECISION: tl.constexpr):
    """One program per (batch entry, head, BLOCK_M query rows), before the mask of `masks` (see `tile_list_kernel`) is
    rewritten.

    keys, values: [B*H, KT, D]; moments: [B*H, 2, D, D], C and S of `pooled.py`, each divided by its largest element,
    which moment_scale holds, float32 [B*H, 2]. Writes row_threshold, float32 [B, H, N_q]; and, where the mask skips a
    tile, out [B, H, N_q, D] and its log2-sum-exp pooled_lse, float32 [B, H, N_q].
    """
    M_PARTS: tl.constexpr = TILE // BLOCK_M
    q_tiles = tl.cdiv(seqlen_q, TILE)
    k_tiles = tl.cdiv(seqlen_k, TILE)
    words_per_list = tl.cdiv(k_tiles, _POOLED)
    pid = tl.program_id(0)
    query_tile = pid // M_PARTS % q_tiles
    batch_head = pid // M_PARTS // q_tiles
    batch_entry = (batch_head // n_heads).to(tl.int64)
    head = (batch_head % n_heads).to(tl.int64)
    offs_m = query_tile * TILE + (pid % M_PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs_m < seqlen_q
    offs_d = tl.arange(0, D_PADDED)
    in_d = offs_d < D
    q_rows = q_ptr + batch_entry * stride_qb + head * stride_qh + tl.minimum(offs_m, seqlen_q - 1).to(
        tl.int64) * stride_qn
    moments_ptr += batch_head.to(tl.int64) * (2 * D * D)
    moment_scale_ptr += 2 * batch_head
    spread_scale = tl.load(moment_scale_ptr + 1) * sm_scale * sm_scale
    variance = _score_variance(q_rows, moments_ptr + D * D, spread_scale, BLOCK_M, D, PRECISION)
    lse_rows = batch_head.to(tl.int64) * seqlen_q + offs_m
    tl.store(row_threshold_ptr + lse_rows, _raised_threshold(threshold, variance, MASS, LOST_MIN, RAISED_MAX),
             mask=in_range)

    words_ptr = tl.load(masks_ptr + 2 * batch_entry).to(tl.pointer_type(tl.int32)) + (
        (head * q_tiles + query_tile) * words_per_list)
    keys_ptr += batch_head.to(tl.int64) * k_tiles * D
    values_ptr += batch_head.to(tl.int64) * k_tiles * D
    offs = tl.arange(0, _POOLED)
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=in_d[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    n_skipped = 0
    for i in tl.range(0, words_per_list, num_stages=1):
        tile = i * _POOLED + offs
        skipped = (((tl.load(words_ptr + i) >> offs) & 1) == 0) & (tile < k_tiles)
        n_here = tl.sum(skipped.to(tl.int32), 0)
        if n_here > 0:
            n_skipped += n_here
            n_keys = tl.minimum(tl.maximum(seqlen_k - tile * TILE, 1), TILE)
            k = tl.load(keys_ptr + tile[None, :] * D + offs_d[:, None], mask=skipped[None, :] & in_d[:, None],
                        other=0.0)
            s = tl.dot(q, k, input_precision=PRECISION) * (sm_scale * 1.4426950408889634)
            s = tl.where(skipped[None, :], s + tl.math.log2(n_keys.to(tl.float32))[None, :], -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.math.exp2(s - m_safe[:, None])
            alpha = tl.math.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            # The value of a tile that is not skipped has weight 0, but 0 * NaN is NaN.
            v = tl.load(values_ptr + tile[:, None] * D + offs_d[None, :], mask=skipped[:, None] & in_d[None, :],
                        other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m_i = m_new
    if n_skipped > 0:
        # q times C goes right into the accumulator, which is brought to the unit of the matrix for that.
        shift_scale = tl.load(moment_scale_ptr)
        acc = acc / (tl.where(l_i == 0.0, 1.0, l_i) * shift_scale)[:, None]
        weight = tl.math.exp2(variance * -0.7213475204444817) * sm_scale  # exp(-variance / 2)
        for channel in tl.range(0, D, 32, num_stages=1):
            part = tl.load(q_rows[:, None] + channel + offs[None, :]).to(tl.float32) * weight[:, None]
            shift = tl.load(moments_ptr + (channel + offs)[:, None] * D + offs_d[None, :], mask=in_d[None, :],
                            other=0.0)
            acc = tl.dot(part.to(shift.dtype), shift, acc, input_precision=PRECISION)
        out_rows = out_ptr + batch_entry * stride_ob + head * stride_oh + offs_m.to(tl.int64) * stride_on
        tl.store(out_rows[:, None] + offs_d[None, :], (acc * shift_scale).to(out_ptr.dtype.element_ty),
                 mask=in_range[:, None] & in_d[None, :])
        tl.store(pooled_lse_ptr + lse_rows, m_i + tl.math.log2(l_i), mask=in_range)
