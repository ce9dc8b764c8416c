"""INT8 copies of q and k and a float16 copy of v, made before the attention of an int8 call.

Scales as in SageAttention (arXiv 2410.02367, sections 4.2 and 4.3): k is smoothed by its channel mean, which moves all
scores of a query alike, so neither softmax nor a skip test changes; q and k have one scale per 128 tokens, the tile of
the skip mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

MEAN_CHUNK = 2048
"""Tokens whose sum one program of `channel_sum_kernel` makes."""

V_LIMIT = tl.constexpr(512.0)
"""Largest |v| after scaling: 64 weights of at most 1 then sum to less than float16's 65504."""
V_FLOOR = tl.constexpr(0.015625)
"""Tiles of smaller values are not scaled up further, so that the ratio of two scales stays within float32."""


@triton.jit(do_not_specialize=["n_heads", "seqlen", "n_chunks"])
def channel_sum_kernel(k_ptr, sums_ptr, stride_kb, stride_kh, stride_kn, n_heads, seqlen, n_chunks,
                       CHUNK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Channel sums over CHUNK tokens. k: [B, H, N, D]; sums: float32 [B*H, n_chunks, D]. In a fixed order."""
    chunk = tl.program_id(0) % n_chunks
    batch_head = tl.program_id(0) // n_chunks
    base = k_ptr + (batch_head // n_heads).to(tl.int64) * stride_kb + (batch_head % n_heads).to(tl.int64) * stride_kh
    offs_d = tl.arange(0, D_PADDED)
    total = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK)
        x = tl.load(base + offs_n.to(tl.int64)[:, None] * stride_kn + offs_d[None, :],
                    mask=(offs_n < seqlen)[:, None] & (offs_d < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + offs_d, total, mask=offs_d < D)


@triton.jit
def _int8_tile(x, out_ptr, scale_ptr, offs, in_range):
    """Symmetric INT8 of one tile. A NaN or Inf in it makes its scale NaN, and so every score with it."""
    limit = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-20)
    finite = tl.min(tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1), 0)
    scaled = x * (127.0 / limit)
    rounded = tl.where(scaled > 0, scaled + 0.5, scaled - 0.5)
    tl.store(out_ptr + offs, tl.where(finite != 0, rounded, 0.0).to(tl.int8), mask=in_range)
    tl.store(scale_ptr, tl.where(finite != 0, limit / 127.0, float("nan")))


@triton.jit(do_not_specialize=["n_heads", "seqlen_q", "seqlen_k", "q_tiles", "k_tiles", "n_chunks"])
def quantize_kernel(q_ptr, k_ptr, v_ptr, sums_ptr, q8_ptr, k8_ptr, v16_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
                    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                    n_heads, seqlen_q, seqlen_k, q_tiles, k_tiles, n_chunks,
                    TILE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, V_FP16: tl.constexpr):
    """One program per (batch entry, head, tile): its queries, its keys and, with V_FP16, its values.

    q8, k8: int8 [B, H, N, D] with scales float32 [B, H, QT], [B, H, KT]. v16: float16 [B, H, N, D] = v / scale with
    powers of two [B, H, KT] that bring |v| to V_LIMIT at most, whatever its range; NaN and Inf stay what they are.
    """
    n_tiles = tl.maximum(q_tiles, k_tiles)
    tile = tl.program_id(0) % n_tiles
    batch_head = tl.program_id(0) // n_tiles
    batch = (batch_head // n_heads).to(tl.int64)
    head = (batch_head % n_heads).to(tl.int64)
    offs_n = tile * TILE + tl.arange(0, TILE)
    offs_d = tl.arange(0, D_PADDED)
    in_head = (offs_d < D)[None, :]
    tokens = offs_n.to(tl.int64)[:, None]
    if tile < q_tiles:
        valid = (offs_n < seqlen_q)[:, None] & in_head
        x = tl.load(q_ptr + batch * stride_qb + head * stride_qh + tokens * stride_qn + offs_d[None, :], mask=valid,
                    other=0.0).to(tl.float32)
        _int8_tile(x, q8_ptr, q_scale_ptr + batch_head * q_tiles + tile,
                   (batch_head.to(tl.int64) * seqlen_q + tokens) * D + offs_d[None, :], valid)
    if tile < k_tiles:
        valid = (offs_n < seqlen_k)[:, None] & in_head
        offs_out = (batch_head.to(tl.int64) * seqlen_k + tokens) * D + offs_d[None, :]
        total = tl.zeros([D_PADDED], tl.float32)
        for chunk in range(0, n_chunks):
            total += tl.load(sums_ptr + (batch_head * n_chunks + chunk).to(tl.int64) * D + offs_d, mask=offs_d < D,
                             other=0.0)
        x = tl.load(k_ptr + batch * stride_kb + head * stride_kh + tokens * stride_kn + offs_d[None, :], mask=valid,
                    other=0.0).to(tl.float32)
        x = tl.where(valid, x - (total / seqlen_k)[None, :], 0.0)
        _int8_tile(x, k8_ptr, k_scale_ptr + batch_head * k_tiles + tile, offs_out, valid)
        if V_FP16:
            x = tl.load(v_ptr + batch * stride_vb + head * stride_vh + tokens * stride_vn + offs_d[None, :], mask=valid,
                        other=0.0).to(tl.float32)
            limit = tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0), 1), 0)
            scale = tl.math.exp2(tl.ceil(tl.math.log2(tl.maximum(limit, V_FLOOR) / V_LIMIT)))
            tl.store(v16_ptr + offs_out, (x / scale).to(tl.float16), mask=valid)
            tl.store(v_scale_ptr + batch_head * k_tiles + tile, scale)
