"""Last launch of a call: attention over each query tile's list of key tiles, recording keep decisions."""

from __future__ import annotations

import triton
import triton.language as tl

# INT8 scores accumulate onto the bit pattern of 1.5 * 2^23 in float32: read as float32, the int32 sum is
# 12582912 + dot exactly (|dot| <= 128 * 127^2 < 2^22), so no conversion instruction is needed.
_MAGIC_BITS = tl.constexpr(0x4B400000)
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _load(k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, batch_entry, head, tile, first, n_left, stride_kn, stride_vn,
          qk_scale, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, MASKED: tl.constexpr,
          TMA: tl.constexpr, INT8: tl.constexpr, PV_FP16: tl.constexpr):
    """k [D_PADDED, BLOCK_N], v [BLOCK_N, D_PADDED] from key `first` on, scale of their scores and of v.

    MASKED: keys from `n_left` on are past the end and come as zeros, as channels past D always do.
    """
    if TMA:
        k = tl.reshape(k_ptr.load([batch_entry, head, first, 0]), [BLOCK_N, D_PADDED]).T
        v = tl.reshape(v_ptr.load([batch_entry, head, first, 0]), [BLOCK_N, D_PADDED])
    else:
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, D_PADDED)
        start = first.to(tl.int64)
        k_tile = k_ptr + start * stride_kn + (offs_n[None, :] * stride_kn + offs_d[:, None])
        v_tile = v_ptr + start * stride_vn + (offs_n[:, None] * stride_vn + offs_d[None, :])
        if MASKED:
            k = tl.load(k_tile, mask=(offs_n < n_left)[None, :] & (offs_d < D)[:, None], other=0)
            v = tl.load(v_tile, mask=(offs_n < n_left)[:, None] & (offs_d < D)[None, :], other=0.0)
        elif D < D_PADDED:
            k = tl.load(k_tile, mask=(offs_d < D)[:, None], other=0)
            v = tl.load(v_tile, mask=(offs_d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
    v_scale = 1.0
    if INT8:
        qk_scale = qk_scale * tl.load(k_scale_ptr + tile)
    if PV_FP16:
        v_scale = tl.load(v_scale_ptr + tile)
    return k, v, qk_scale, v_scale


@triton.jit
def _attend(q, k, v, acc, acc_unit, m_i, l_i, tile_mass, row_bits, word, words_ptr, n_left, part, n_parts, tile,
            qk_scale, v_scale, threshold,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, RECORD_IN_REGISTERS: tl.constexpr,
            MASS: tl.constexpr, INT8: tl.constexpr, PV_FP16: tl.constexpr, PRECISION: tl.constexpr):
    """One compute tile of the online softmax, part `part` of the `n_parts` of its mask tile.

    m_i, threshold: log2; l_i, tile_mass: sums of 2^(s - m_i) over all keys so far and over this mask tile's; acc: the
    same sum of values, in units of acc_unit. row_bits: keep decisions of each query row in mask word number `word`.
    """
    if INT8:
        dots = tl.dot(q, k, tl.full([BLOCK_M, BLOCK_N], _MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        s = dots.to(tl.float32, bitcast=True)
    else:
        s = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        s = tl.where((tl.arange(0, BLOCK_N) < n_left)[None, :], s, -float("inf"))
    if INT8:
        offset = _MAGIC * qk_scale
        tile_max = (tl.max(s, 1) - _MAGIC) * qk_scale
        qk_scale = qk_scale[:, None]
    else:
        offset = 0.0
        tile_max = tl.max(s, 1) * qk_scale
    m_new = tl.maximum(m_i, tile_max)
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row of nothing but -inf so far: avoid inf - inf
    p = tl.math.exp2(s * qk_scale - (m_safe + offset)[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    mass = tl.sum(p, 1)
    l_i = l_i * alpha + mass
    if PV_FP16:
        # The sum over one compute tile fits float16: weights are at most 1 and |v| at most V_LIMIT. The accumulator
        # is in units of the latest scale of v, so that taking the sum in is one multiply-add.
        rescale = alpha * (acc_unit / v_scale)
        acc = acc * rescale[:, None] + tl.dot(p.to(tl.float16), v, out_dtype=tl.float16).to(tl.float32)
        acc_unit = v_scale
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    # MASS: a row's share of the mask tile is known after its last compute tile. Otherwise each compute tile votes: the
    # reference may move between them without changing the decision, because a row that moved it has voted to keep.
    # Dropped only if at or below the threshold in numbers that compare: NaN and Inf (l_i is NaN then) keep.
    if MASS:
        tile_mass = tl.where(part == 0, 0.0, tile_mass * alpha) + mass
        stays = tl.where((tile_mass <= threshold * l_i) & (l_i > 0) | (part != n_parts - 1), 0, 1)
    else:
        stays = tl.where((tile_max - m_i <= threshold) & (l_i == l_i), 0, 1)
    if RECORD_IN_REGISTERS:
        if (tile >> 5) != word:
            tl.atomic_or(words_ptr + word, tl.reduce(row_bits, 0, _or), sem="relaxed")
            row_bits = row_bits * 0
            word = tile >> 5
        row_bits = row_bits | (stays << (tile & 31))
    else:
        tl.atomic_or(words_ptr + (tile >> 5), 1 << (tile & 31), mask=tl.max(stays, 0) != 0, sem="relaxed")
    return acc, acc_unit, m_new, l_i, tile_mass, row_bits, word


@triton.jit(do_not_specialize=["qk_scale", "threshold", "n_heads", "seqlen_q", "seqlen_k"])
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
                     masks_ptr, lists_ptr, counts_ptr, order_ptr, row_threshold_ptr, pooled_lse_ptr,
                     stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                     stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
                     qk_scale, threshold, n_heads, seqlen_q, seqlen_k,
                     TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
                     D_PADDED: tl.constexpr, RAGGED: tl.constexpr, RECORD_IN_REGISTERS: tl.constexpr,
                     MASS: tl.constexpr, TMA: tl.constexpr, INT8: tl.constexpr, PV_FP16: tl.constexpr,
                     HAS_LSE: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr):
    """One program per (batch entry, head, BLOCK_M query rows), query tile fastest so that a head's K, V stay in L2.

    Pointers as in `tile_list_kernel`; order: int64 [B*H*QT], which list each program takes. q, k, v, out are
    [B, H, N, D] with unit last stride. With TMA, k_ptr and v_ptr are tensor descriptors of blocks [1, 1, BLOCK_N, D].
    Row, head and batch offsets are int64; offsets within a compute tile are int32.

    RAGGED: the last key tile is not whole. INT8: q, k are int8 with scales float32 [B, H, N_q] and [B, H, KT].
    PV_FP16: v is float16 with scales [B, H, KT]. MASS: the test is on a tile's share of the row's sum so far, and
    threshold is that share, not its log2. POOLED: row_threshold, float32 [B, H, N_q], takes the place of threshold;
    where a tile is skipped, out holds the attention over pooled keys and pooled_lse, [B, H, N_q], its log2-sum-exp.
    """
    M_PARTS: tl.constexpr = TILE // BLOCK_M
    N_PARTS: tl.constexpr = TILE // BLOCK_N
    q_tiles = tl.cdiv(seqlen_q, TILE)
    k_tiles = tl.cdiv(seqlen_k, TILE)
    pid = tl.program_id(0)
    list_index = tl.load(order_ptr + pid // M_PARTS).to(tl.int32)
    query_tile = list_index % q_tiles
    batch_head = list_index // q_tiles
    batch_entry = batch_head // n_heads
    head = batch_head % n_heads
    batch_offset = batch_entry.to(tl.int64)
    head_offset = head.to(tl.int64)
    offs_m = query_tile * TILE + (pid % M_PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D_PADDED)
    # Rows past the end repeat the last valid row: their votes are its votes, so no mask is needed in the loop.
    rows = tl.minimum(offs_m, seqlen_q - 1)
    q_rows = q_ptr + batch_offset * stride_qb + head_offset * stride_qh + rows.to(tl.int64) * stride_qn
    if D < D_PADDED:
        q = tl.load(q_rows[:, None] + offs_d[None, :], mask=(offs_d < D)[None, :], other=0)
    else:
        q = tl.load(q_rows[:, None] + offs_d[None, :])
    if not TMA:
        k_ptr += batch_offset * stride_kb + head_offset * stride_kh
        v_ptr += batch_offset * stride_vb + head_offset * stride_vh
    if INT8:
        qk_scale = qk_scale * tl.load(q_scale_ptr + batch_head.to(tl.int64) * seqlen_q + rows)
        k_scale_ptr += batch_head * k_tiles
    if PV_FP16:
        v_scale_ptr += batch_head * k_tiles
    if POOLED:
        threshold = tl.load(row_threshold_ptr + batch_head.to(tl.int64) * seqlen_q + rows)
    acc = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    acc_unit = 1.0
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    tile_mass = tl.zeros([BLOCK_M], tl.float32)
    row_bits = tl.zeros([BLOCK_M], tl.int32)
    word = 0
    words_ptr = tl.load(masks_ptr + 2 * batch_entry).to(tl.pointer_type(tl.int32)) + (
        (head_offset * q_tiles + query_tile) * tl.cdiv(k_tiles, 32))
    list_ptr = lists_ptr + list_index.to(tl.int64) * (tl.cdiv(k_tiles, 16) * 16)
    n_active = tl.load(counts_ptr + list_index)
    n_partial = 0
    if RAGGED:
        final = tl.load(list_ptr + tl.maximum(n_active - 1, 0)).to(tl.int32)
        n_partial = ((n_active > 0) & (final == k_tiles - 1)).to(tl.int32)

    for i in tl.range(0, (n_active - n_partial) * N_PARTS, num_stages=NUM_STAGES):
        tile = tl.load(list_ptr + i // N_PARTS).to(tl.int32)
        first = tile * TILE + (i % N_PARTS) * BLOCK_N
        k, v, tile_scale, v_scale = _load(
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, batch_entry, head, tile, first, BLOCK_N, stride_kn, stride_vn,
            qk_scale, BLOCK_N, D, D_PADDED, MASKED=False, TMA=TMA, INT8=INT8, PV_FP16=PV_FP16)
        acc, acc_unit, m_i, l_i, tile_mass, row_bits, word = _attend(
            q, k, v, acc, acc_unit, m_i, l_i, tile_mass, row_bits, word, words_ptr, BLOCK_N, i % N_PARTS, N_PARTS, tile,
            tile_scale, v_scale, threshold, BLOCK_M, BLOCK_N, MASKED=False, RECORD_IN_REGISTERS=RECORD_IN_REGISTERS,
            MASS=MASS, INT8=INT8, PV_FP16=PV_FP16, PRECISION=PRECISION)
    if RAGGED:
        # After the main loop and not inside it: a mask in there costs a quarter more instructions.
        tile = k_tiles - 1
        n_parts = tl.cdiv(seqlen_k - tile * TILE, BLOCK_N)
        for i in tl.range(0, n_partial * n_parts, num_stages=1):
            first = tile * TILE + i * BLOCK_N
            n_left = seqlen_k - first
            k, v, tile_scale, v_scale = _load(
                k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, batch_entry, head, tile, first, n_left, stride_kn, stride_vn,
                qk_scale, BLOCK_N, D, D_PADDED, MASKED=True, TMA=TMA, INT8=INT8, PV_FP16=PV_FP16)
            acc, acc_unit, m_i, l_i, tile_mass, row_bits, word = _attend(
                q, k, v, acc, acc_unit, m_i, l_i, tile_mass, row_bits, word, words_ptr, n_left, i, n_parts, tile,
                tile_scale, v_scale, threshold, BLOCK_M, BLOCK_N, MASKED=True, RECORD_IN_REGISTERS=RECORD_IN_REGISTERS,
                MASS=MASS, INT8=INT8, PV_FP16=PV_FP16, PRECISION=PRECISION)
    if RECORD_IN_REGISTERS:
        tl.atomic_or(words_ptr + word, tl.reduce(row_bits, 0, _or), sem="relaxed")

    out_rows = out_ptr + batch_offset * stride_ob + head_offset * stride_oh + offs_m.to(tl.int64) * stride_on
    lse_rows = batch_head.to(tl.int64) * seqlen_q + offs_m
    in_range = offs_m < seqlen_q
    in_out = in_range[:, None] & (offs_d < D)[None, :]
    acc = acc * (acc_unit / tl.where(l_i == 0.0, 1.0, l_i))[:, None]  # an empty list gives 0, not 0 / 0
    lse = tl.where(l_i == 0.0, -float("inf"), m_i + tl.math.log2(l_i))
    if POOLED:
        if n_active < k_tiles:
            pooled = tl.load(out_rows[:, None] + offs_d[None, :], mask=in_out, other=0.0).to(tl.float32)
            pooled_lse = tl.load(pooled_lse_ptr + lse_rows, mask=in_range, other=0.0)
            top = tl.maximum(lse, pooled_lse)
            top = tl.where(top == -float("inf"), 0.0, top)
            exact_weight = tl.math.exp2(lse - top)
            pooled_weight = tl.math.exp2(pooled_lse - top)
            total = exact_weight + pooled_weight
            acc = acc * (exact_weight / total)[:, None] + pooled * (pooled_weight / total)[:, None]
            lse = top + tl.math.log2(total)
    tl.store(out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=in_out)
    if HAS_LSE:
        tl.store(lse_ptr + lse_rows, lse * 0.6931471805599453, mask=in_range)
