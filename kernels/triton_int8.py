"""INT8 copies of q and k and a float16 copy of v, made before the attention of an int8 call.

As in SageAttention (arXiv 2410.02367, sections 4.2 and 4.3) k is smoothed by its channel mean, which moves all scores
of a query alike, so neither softmax nor a skip test changes. Channels that stand out in q or k are brought nearer to
the others by a power of two, by which the other tensor's channel is multiplied (see `balance_kernel`). Then q has one
scale per row, and k one per 128 tokens, the tile of the skip mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 2048
"""Tokens of k whose sums one program of `channel_sum_kernel` makes."""
Q_CHUNK = 512
"""Tokens of q that it looks at, of as many: a quarter says which channels are large."""
V_LIMIT = tl.constexpr(512.0)
"""Largest |v| after scaling: 64 weights of at most 1 then sum to less than float16's 65504."""
V_FLOOR = tl.constexpr(0.015625)
"""Tiles of smaller values are not scaled up further, so that the ratio of two scales stays within float32."""


@triton.jit
def _block(base, offs_n, offs_d, stride_n, seqlen, D: tl.constexpr):
    """float32 tokens offs_n of base [N, D]; zeros past the end."""
    return tl.load(base + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :],
                   mask=(offs_n < seqlen)[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_heads", "seqlen_q", "seqlen_k", "n_chunks"])
def channel_sum_kernel(q_ptr, k_ptr, sums_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                       n_heads, seqlen_q, seqlen_k, n_chunks, CHUNK: tl.constexpr, Q_CHUNK: tl.constexpr,
                       BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Channel sums over CHUNK tokens. q, k: [B, H, N, D]; sums: float32 [B*H, n_chunks, 3, D], of k, of its squares
    and, over the first Q_CHUNK of these tokens, of finite |q|. In a fixed order."""
    first = tl.program_id(0) % n_chunks * CHUNK
    batch_head = tl.program_id(0) // n_chunks
    batch = (batch_head // n_heads).to(tl.int64)
    head = (batch_head % n_heads).to(tl.int64)
    offs_d = tl.arange(0, D_PADDED)
    total = tl.zeros([D_PADDED], tl.float32)
    squares = tl.zeros([D_PADDED], tl.float32)
    sizes = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        x = _block(k_ptr + batch * stride_kb + head * stride_kh, first + start + tl.arange(0, BLOCK), offs_d, stride_kn,
                   seqlen_k, D)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
    for start in range(0, Q_CHUNK, BLOCK):
        x = _block(q_ptr + batch * stride_qb + head * stride_qh, first + start + tl.arange(0, BLOCK), offs_d, stride_qn,
                   seqlen_q, D)
        sizes += tl.sum(tl.where(x - x == 0.0, tl.abs(x), 0.0), 0)
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 * D) + offs_d
    tl.store(sums_ptr, total, mask=offs_d < D)
    tl.store(sums_ptr + D, squares, mask=offs_d < D)
    tl.store(sums_ptr + 2 * D, sizes, mask=offs_d < D)


@triton.jit
def _standing_out(x, least, D: tl.constexpr):
    """x relative to `least` times its mean, where that is above 1, else 1; at most D. NaN: 1."""
    ratio = x * D / (tl.sum(x, 0) * least)
    return tl.where(ratio > 1.0, tl.minimum(ratio, D), 1.0)


@triton.jit(do_not_specialize=["seqlen_k", "n_chunks"])
def balance_kernel(sums_ptr, mean_ptr, balance_ptr, seqlen_k, n_chunks, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Mean of k, and the power of two by which each channel of k is multiplied and that of q divided, float32
    [B*H, D], from `sums` of `channel_sum_kernel`. One program per (batch entry, head).

    A channel that is x times as large as the others in q and as large as they are in k becomes sqrt(x) times as large
    in both, so that INT8 steps are finer for all others. Sizes are mean |q|, which a few large tokens do not move (they
    have scales of their own), and the standard deviation of k, relative to the mean of all channels. Below twice that
    mean in q, or below it in k, a channel does not decide about scales. Factors are from 1/16 to 16.
    """
    offs_d = tl.arange(0, D_PADDED)
    in_head = offs_d < D
    total = tl.zeros([D_PADDED], tl.float32)
    squares = tl.zeros([D_PADDED], tl.float32)
    sizes = tl.zeros([D_PADDED], tl.float32)
    for chunk in range(0, n_chunks):
        sums = sums_ptr + (tl.program_id(0) * n_chunks + chunk).to(tl.int64) * (3 * D) + offs_d
        total += tl.load(sums, mask=in_head, other=0.0)
        squares += tl.load(sums + D, mask=in_head, other=0.0)
        sizes += tl.load(sums + 2 * D, mask=in_head, other=0.0)
    mean = total / seqlen_k
    deviation = tl.sqrt(tl.maximum(squares / seqlen_k - mean * mean, 0.0))
    ratio = _standing_out(sizes, 2.0, D) / _standing_out(deviation, 1.0, D)
    power = tl.floor(0.5 * tl.math.log2(ratio) + 0.5).to(tl.int32)
    tl.store(mean_ptr + tl.program_id(0) * D + offs_d, mean, mask=in_head)
    tl.store(balance_ptr + tl.program_id(0) * D + offs_d, ((power + 127) << 23).to(tl.float32, bitcast=True),
             mask=in_head)


@triton.jit
def _int8(x, limit, finite):
    """x in steps of limit / 127, and 0 where finite is 0."""
    scaled = x * (127.0 / limit)
    rounded = tl.where(scaled > 0, scaled + 0.5, scaled - 0.5)
    return tl.where(finite != 0, rounded, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["n_heads", "seqlen_q", "seqlen_k", "q_tiles", "k_tiles"])
def quantize_kernel(q_ptr, k_ptr, v_ptr, mean_ptr, balance_ptr, q8_ptr, k8_ptr, v16_ptr, q_scale_ptr, k_scale_ptr,
                    v_scale_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                    stride_vb, stride_vh, stride_vn, n_heads, seqlen_q, seqlen_k, q_tiles, k_tiles,
                    TILE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, V_FP16: tl.constexpr):
    """One program per (batch entry, head, tile): its queries, its keys and, with V_FP16, its values.

    mean, balance: float32 [B*H, D] of `balance_kernel`. q8, k8: int8 [B, H, N, D] with scales float32 [B, H, N_q],
    [B, H, KT]; a NaN or Inf makes its scale NaN, and so every score with it. v16: float16 [B, H, N, D] = v / scale with
    powers of two [B, H, KT] that bring |v| to V_LIMIT at most, whatever its range; NaN and Inf stay what they are.
    """
    n_tiles = tl.maximum(q_tiles, k_tiles)
    tile = tl.program_id(0) % n_tiles
    batch_head = tl.program_id(0) // n_tiles
    batch = (batch_head // n_heads).to(tl.int64)
    head = (batch_head % n_heads).to(tl.int64)
    offs_n = tile * TILE + tl.arange(0, TILE)
    offs_d = tl.arange(0, D_PADDED)
    in_head = offs_d < D
    balance = tl.load(balance_ptr + batch_head * D + offs_d, mask=in_head, other=1.0)
    tokens = batch_head.to(tl.int64) * seqlen_q + offs_n
    if tile < q_tiles:
        valid = offs_n < seqlen_q
        x = _block(q_ptr + batch * stride_qb + head * stride_qh, offs_n, offs_d, stride_qn, seqlen_q, D)
        x = x / balance[None, :]
        limit = tl.maximum(tl.max(tl.abs(x), 1), 1e-20)
        finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1)
        tl.store(q8_ptr + tokens[:, None] * D + offs_d[None, :], _int8(x, limit[:, None], finite[:, None]),
                 mask=valid[:, None] & in_head[None, :])
        tl.store(q_scale_ptr + tokens, tl.where(finite != 0, limit / 127.0, float("nan")), mask=valid)
    if tile < k_tiles:
        valid = (offs_n < seqlen_k)[:, None] & in_head[None, :]
        offs_out = (batch_head.to(tl.int64) * seqlen_k + offs_n)[:, None] * D + offs_d[None, :]
        x = _block(k_ptr + batch * stride_kb + head * stride_kh, offs_n, offs_d, stride_kn, seqlen_k, D)
        mean = tl.load(mean_ptr + batch_head * D + offs_d, mask=in_head, other=0.0)
        x = tl.where(valid, (x - mean[None, :]) * balance[None, :], 0.0)
        limit = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-20)
        finite = tl.min(tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1), 0)
        tl.store(k8_ptr + offs_out, _int8(x, limit, finite), mask=valid)
        tl.store(k_scale_ptr + batch_head * k_tiles + tile, tl.where(finite != 0, limit / 127.0, float("nan")))
        if V_FP16:
            x = _block(v_ptr + batch * stride_vb + head * stride_vh, offs_n, offs_d, stride_vn, seqlen_k, D)
            limit = tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0), 1), 0)
            scale = tl.math.exp2(tl.ceil(tl.math.log2(tl.maximum(limit, V_FLOOR) / V_LIMIT)))
            tl.store(v16_ptr + offs_out, (x / scale).to(tl.float16), mask=valid)
            tl.store(v_scale_ptr + batch_head * k_tiles + tile, scale)
