"""Last launch of a call: attention over each query tile's list of key tiles, recording keep decisions."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_pooled import add_stand_ins, raised_threshold, score_variance

# INT8 scores accumulate onto the bit pattern of 1.5 * 2^23 in float32: read as float32, the int32 sum is
# 12582912 + dot exactly (|dot| <= 128 * 127^2 < 2^22), so no conversion instruction is needed.
_MAGIC_BITS = tl.constexpr(0x4B400000)
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _row_of_program(pid, order_ptr, order_turn, n_rows, COST_CLASSES: tl.constexpr):
    """The mask row that program `pid` takes: the costliest class first, see `expand_kernel`."""
    # Scalars only: with a scan and reductions here, ptxas spills in the main loop.
    slot = 0
    start = 0
    for cost_class in tl.static_range(COST_CLASSES):
        size = tl.load(order_ptr + order_turn * COST_CLASSES + cost_class)
        slot = tl.where((pid >= start) & (pid < start + size), cost_class * n_rows + pid - start, slot)
        start += size
    return tl.load(order_ptr + 2 * COST_CLASSES + slot)


@triton.jit
def _weigh(s, v, v_tail, acc, acc_tail, acc_unit, m_i, m_new, l_i, qk_scale, offset, v_scale,
           D_TAIL: tl.constexpr, PV_FP16: tl.constexpr, PRECISION: tl.constexpr):
    """Exponentials and P·V of one compute tile, added to the running sums."""
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row of nothing but -inf so far: avoid inf - inf
    p = tl.math.exp2(s * qk_scale - (m_safe + offset)[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    mass = tl.sum(p, 1)
    l_i = l_i * alpha + mass
    if PV_FP16:
        # The sum over one compute tile fits float16: weights are at most 1 and |v| at most V_LIMIT. The accumulator
        # is in units of the latest scale of v, so that taking the sum in is one multiply-add.
        p = p.to(tl.float16)
        rescale = alpha * (acc_unit / v_scale)
        acc = acc * rescale[:, None] + tl.dot(p, v, out_dtype=tl.float16).to(tl.float32)
        if D_TAIL:
            acc_tail = acc_tail * rescale[:, None] + tl.dot(p, v_tail, out_dtype=tl.float16).to(tl.float32)
        acc_unit = v_scale
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        if D_TAIL:
            acc_tail = tl.dot(p.to(v.dtype), v_tail, acc_tail * alpha[:, None], input_precision=PRECISION)
    return acc, acc_tail, acc_unit, l_i, mass, alpha


@triton.jit
def _accumulate(q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, acc_unit, m_i, l_i, tile_mass, n_left, part, n_parts,
                tile, row_bits, word, words_ptr, qk_scale, v_scale, threshold,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D_TAIL: tl.constexpr, PARTIAL: tl.constexpr,
                RECORD: tl.constexpr, MASS: tl.constexpr, BRANCH: tl.constexpr, INT8: tl.constexpr,
                PV_FP16: tl.constexpr, PRECISION: tl.constexpr):
    """One compute tile of the online softmax, part `part` of the `n_parts` of its mask tile.

    m_i, threshold: log2; l_i, tile_mass: sums of 2^(s - m_i) over all keys so far and over this mask tile's.
    """
    if INT8:
        dots = tl.dot(q, k, tl.full([BLOCK_M, BLOCK_N], _MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        if D_TAIL:
            dots = tl.dot(q_tail, k_tail, dots, out_dtype=tl.int32)
        s = dots.to(tl.float32, bitcast=True)
    else:
        s = tl.dot(q, k, input_precision=PRECISION)
        if D_TAIL:
            s = tl.dot(q_tail, k_tail, s, input_precision=PRECISION)
    if PARTIAL:
        s = tl.where((tl.arange(0, BLOCK_N) < n_left)[None, :], s, -float("inf"))
    if INT8:
        offset = _MAGIC * qk_scale
        tile_max = (tl.max(s, 1) - _MAGIC) * qk_scale
    else:
        offset = 0.0
        tile_max = tl.max(s, 1) * qk_scale
    m_new = tl.maximum(m_i, tile_max)
    # MASS: a row's share of the mask tile is known after its last compute tile. Otherwise each compute tile votes: the
    # reference may move between them without changing the decision, because a row that moved it has voted to keep.
    # Dropped only if at or below the threshold in numbers that compare: NaN and Inf (l_i is NaN then) keep.
    if BRANCH:
        any_stays = tl.max(tl.where((tile_max - m_i <= threshold) & (l_i == l_i), 0, 1), 0)
        if any_stays != 0:
            tl.atomic_or(words_ptr + (tile >> 5), 1 << (tile & 31), sem="relaxed")
            acc, acc_tail, acc_unit, l_i, _, _ = _weigh(
                s, v, v_tail, acc, acc_tail, acc_unit, m_i, m_new, l_i, qk_scale, offset, v_scale, D_TAIL, PV_FP16,
                PRECISION)
    else:
        acc, acc_tail, acc_unit, l_i, mass, alpha = _weigh(
            s, v, v_tail, acc, acc_tail, acc_unit, m_i, m_new, l_i, qk_scale, offset, v_scale, D_TAIL, PV_FP16,
            PRECISION)
        if RECORD > 0:
            if MASS:
                tile_mass = tl.where(part == 0, 0.0, tile_mass * alpha) + mass
                stays = tl.where((tile_mass <= threshold * l_i) & (l_i > 0) | (part != n_parts - 1), 0, 1)
            else:
                stays = tl.where((tile_max - m_i <= threshold) & (l_i == l_i), 0, 1)
            if RECORD == 1:
                any_stays = tl.max(stays, 0)
                tl.atomic_or(words_ptr + (tile >> 5), 1 << (tile & 31), mask=any_stays != 0, sem="relaxed")
            else:
                if (tile >> 5) != word:
                    tl.atomic_or(words_ptr + word, tl.reduce(row_bits, 0, _or), sem="relaxed")
                    row_bits = row_bits * 0
                    word = tile >> 5
                row_bits = row_bits | (stays << (tile & 31))
    return acc, acc_tail, acc_unit, m_new, l_i, tile_mass, row_bits, word


@triton.jit(do_not_specialize=["qk_scale", "threshold", "n_heads", "n_rows", "seqlen_q", "seqlen_k", "q_tiles",
                               "k_tiles", "row_words", "list_stride", "order_turn"])
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
                     rows_ptr, list_ptr, count_ptr, order_ptr,
                     read_words_ptr, keys_ptr, values_ptr, moments_ptr, moment_scale_ptr,
                     stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                     stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
                     qk_scale, threshold, n_heads, n_rows, seqlen_q, seqlen_k, q_tiles, k_tiles, row_words,
                     list_stride, order_turn,
                     TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D_MAIN: tl.constexpr,
                     D_TAIL: tl.constexpr, DENSE: tl.constexpr, RAGGED: tl.constexpr, COST_CLASSES: tl.constexpr,
                     RECORD: tl.constexpr, MASS: tl.constexpr, BRANCH: tl.constexpr, TMA: tl.constexpr,
                     INT8: tl.constexpr, PV_FP16: tl.constexpr, HAS_LSE: tl.constexpr, STAND_IN: tl.constexpr,
                     STAKE_MIN: tl.constexpr, RAISED_MAX: tl.constexpr, PRECISION: tl.constexpr,
                     NUM_STAGES: tl.constexpr):
    """One program per (batch row, head, BLOCK_M query rows), query tile fastest so that a head's K, V stay in L2.

    Pointers as in `expand_kernel`; q, k, v, out are [B, H, N, D_MAIN + D_TAIL] with unit last stride. With TMA, k_ptr
    and v_ptr are tensor descriptors of blocks [1, 1, BLOCK_N, D_MAIN]. Row, head and batch offsets are int64; offsets
    within a compute tile are int32.

    INT8: q, k are int8 with scales float32 [B, H, QT] and [B, H, KT]. PV_FP16: v is float16 with scales [B, H, KT].
    MASS: the test is on a tile's share of the row's sum so far, and threshold is that share, not its log2.
    BRANCH: while recording, a compute tile that all rows may drop is left out of this very call too.
    DENSE: every tile, in the order of a full list, without list or mask. COST_CLASSES > 0: costly rows first.
    STAND_IN: skipped tiles are represented, see `pooled.py`. read_words: int32 [B*H*QT, row_words], the mask as this
    call has read it. keys, values: [B*H, KT, D]; moments: [B*H, 2, D, D], C and S, each divided by its largest element,
    which moment_scale holds, float32 [B*H, 2].
    """
    M_PARTS: tl.constexpr = TILE // BLOCK_M
    N_PARTS: tl.constexpr = TILE // BLOCK_N
    pid = tl.program_id(0)
    mask_row = pid // M_PARTS
    if COST_CLASSES > 0:
        mask_row = _row_of_program(mask_row, order_ptr, order_turn, n_rows, COST_CLASSES)
    q_tile = mask_row % q_tiles
    batch_head = mask_row // q_tiles
    batch_index = batch_head // n_heads
    head_index = batch_head % n_heads
    batch = batch_index.to(tl.int64)
    head = head_index.to(tl.int64)
    offs_m = q_tile * TILE + (pid % M_PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D_MAIN)
    # Rows past the end repeat the last valid row: their votes are its votes, so no mask is needed in the loop.
    q_rows = q_ptr + batch * stride_qb + head * stride_qh + tl.minimum(offs_m, seqlen_q - 1).to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + offs_d[None, :])
    if not TMA:
        k_base = k_ptr + batch * stride_kb + head * stride_kh
        v_base = v_ptr + batch * stride_vb + head * stride_vh
        k_offs = offs_n[None, :] * stride_kn + offs_d[:, None]
        v_offs = offs_n[:, None] * stride_vn + offs_d[None, :]
    acc = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    if D_TAIL:
        offs_t = D_MAIN + tl.arange(0, D_TAIL)
        q_tail = tl.load(q_rows[:, None] + offs_t[None, :])
        k_tail_offs = offs_n[None, :] * stride_kn + offs_t[:, None]
        v_tail_offs = offs_n[:, None] * stride_vn + offs_t[None, :]
        acc_tail = tl.zeros([BLOCK_M, D_TAIL], tl.float32)
    else:
        q_tail = q
        acc_tail = 0.0
    if INT8:
        qk_scale = qk_scale * tl.load(q_scale_ptr + mask_row)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    tile_mass = tl.zeros([BLOCK_M], tl.float32)
    row_bits = tl.zeros([BLOCK_M], tl.int32)
    word = 0
    words_ptr = count_ptr
    if RECORD > 0:
        words_ptr = tl.load(rows_ptr + 2 * batch).to(tl.pointer_type(tl.int32)) + (
            (head * q_tiles + q_tile) * row_words)
    row_list_ptr = list_ptr
    n_tail = 0
    if DENSE:
        n_whole = k_tiles
        if RAGGED:
            n_tail = 1
    else:
        row_list_ptr += mask_row.to(tl.int64) * list_stride
        n_whole = tl.load(count_ptr + mask_row)
        if RAGGED:
            final = tl.load(row_list_ptr + tl.maximum(n_whole - 1, 0)).to(tl.int32)
            n_tail = ((n_whole > 0) & (final == k_tiles - 1)).to(tl.int32)
    n_active = n_whole
    n_whole -= n_tail
    if STAND_IN:
        moments_ptr += batch_head.to(tl.int64) * (2 * (D_MAIN + D_TAIL) * (D_MAIN + D_TAIL))
        moment_scale_ptr += 2 * batch_head
        sm_scale = qk_scale * 0.6931471805599453  # of q as it is here: INT8 has put its scale in
        spread_ptr = moments_ptr + (D_MAIN + D_TAIL) * (D_MAIN + D_TAIL)
        spread_scale = tl.load(moment_scale_ptr + 1) * sm_scale * sm_scale
        if RECORD > 0:
            variance = score_variance(q_rows, spread_ptr, spread_scale, BLOCK_M, D_MAIN + D_TAIL, PRECISION)
            threshold = raised_threshold(threshold, variance, MASS, STAKE_MIN, RAISED_MAX)
    tile_scale = qk_scale
    v_scale = 1.0
    acc_unit = 1.0

    for i in tl.range(0, n_whole * N_PARTS, num_stages=NUM_STAGES):
        if DENSE:
            position = i // N_PARTS
            tile = tl.where(position == 0, q_tile, position - (position <= q_tile).to(tl.int32))
            tile = tl.where(q_tile < n_whole, tile, position)  # no own tile among the whole ones
        else:
            tile = tl.load(row_list_ptr + i // N_PARTS).to(tl.int32)
        first = tile * TILE + (i % N_PARTS) * BLOCK_N
        start_n = first.to(tl.int64)
        if TMA:
            k = tl.reshape(k_ptr.load([batch_index, head_index, first, 0]), [BLOCK_N, D_MAIN]).T
            v = tl.reshape(v_ptr.load([batch_index, head_index, first, 0]), [BLOCK_N, D_MAIN])
        else:
            k = tl.load(k_base + start_n * stride_kn + k_offs)
            v = tl.load(v_base + start_n * stride_vn + v_offs)
        k_tail = k
        v_tail = v
        if D_TAIL:
            k_tail = tl.load(k_base + start_n * stride_kn + k_tail_offs)
            v_tail = tl.load(v_base + start_n * stride_vn + v_tail_offs)
        if INT8:
            tile_scale = qk_scale * tl.load(k_scale_ptr + batch_head * k_tiles + tile)
        if PV_FP16:
            v_scale = tl.load(v_scale_ptr + batch_head * k_tiles + tile)
        acc, acc_tail, acc_unit, m_i, l_i, tile_mass, row_bits, word = _accumulate(
            q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, acc_unit, m_i, l_i, tile_mass, BLOCK_N, i % N_PARTS,
            N_PARTS, tile, row_bits, word, words_ptr, tile_scale, v_scale, threshold, BLOCK_M, BLOCK_N, D_TAIL, False,
            RECORD, MASS, BRANCH, INT8, PV_FP16, PRECISION)
    if RAGGED:
        # After the main loop and not inside it: a mask in there costs a quarter more instructions.
        tile = k_tiles - 1
        n_parts = tl.cdiv(seqlen_k - tile * TILE, BLOCK_N)
        for i in tl.range(0, n_tail * n_parts, num_stages=1):
            first = tile * TILE + i * BLOCK_N
            start_n = first.to(tl.int64)
            n_left = seqlen_k - first
            if TMA:
                k = tl.reshape(k_ptr.load([batch_index, head_index, first, 0]), [BLOCK_N, D_MAIN]).T
                v = tl.reshape(v_ptr.load([batch_index, head_index, first, 0]), [BLOCK_N, D_MAIN])
            else:
                k = tl.load(k_base + start_n * stride_kn + k_offs, mask=(offs_n < n_left)[None, :], other=0)
                v = tl.load(v_base + start_n * stride_vn + v_offs, mask=(offs_n < n_left)[:, None], other=0.0)
            k_tail = k
            v_tail = v
            if D_TAIL:
                k_tail = tl.load(k_base + start_n * stride_kn + k_tail_offs, mask=(offs_n < n_left)[None, :], other=0)
                v_tail = tl.load(v_base + start_n * stride_vn + v_tail_offs, mask=(offs_n < n_left)[:, None], other=0.0)
            if INT8:
                tile_scale = qk_scale * tl.load(k_scale_ptr + batch_head * k_tiles + tile)
            if PV_FP16:
                v_scale = tl.load(v_scale_ptr + batch_head * k_tiles + tile)
            acc, acc_tail, acc_unit, m_i, l_i, tile_mass, row_bits, word = _accumulate(
                q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, acc_unit, m_i, l_i, tile_mass, n_left, i, n_parts,
                tile, row_bits, word, words_ptr, tile_scale, v_scale, threshold, BLOCK_M, BLOCK_N, D_TAIL, True,
                RECORD, MASS, BRANCH, INT8, PV_FP16, PRECISION)
    if RECORD == 3 and not BRANCH:
        tl.atomic_or(words_ptr + word, tl.reduce(row_bits, 0, _or), sem="relaxed")

    if STAND_IN:
        if PV_FP16:
            acc = acc * acc_unit
            if D_TAIL:
                acc_tail = acc_tail * acc_unit
            acc_unit = 1.0
        # Again, and not kept through the loop, where it would spill.
        variance = score_variance(q_rows, spread_ptr, spread_scale, BLOCK_M, D_MAIN + D_TAIL, PRECISION)
        stand_ins = batch_head.to(tl.int64) * k_tiles * (D_MAIN + D_TAIL)
        acc, acc_tail, m_i, l_i = add_stand_ins(
            q.to(keys_ptr.dtype.element_ty), q_tail.to(keys_ptr.dtype.element_ty), q_rows, acc, acc_tail, m_i, l_i,
            variance, read_words_ptr + mask_row.to(tl.int64) * row_words, keys_ptr + stand_ins, values_ptr + stand_ins,
            moments_ptr, tl.load(moment_scale_ptr), sm_scale, qk_scale, tl.where(n_active < k_tiles, row_words, 0),
            k_tiles, seqlen_k, TILE, D_MAIN, D_TAIL, PRECISION)

    inverse = acc_unit / tl.where(l_i == 0.0, 1.0, l_i)  # an empty list gives 0, not 0 / 0
    in_range = offs_m < seqlen_q
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + offs_m.to(tl.int64) * stride_on
    acc = acc * inverse[:, None]
    tl.store(out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=in_range[:, None])
    if D_TAIL:
        acc_tail = acc_tail * inverse[:, None]
        tl.store(out_rows[:, None] + offs_t[None, :], acc_tail.to(out_ptr.dtype.element_ty), mask=in_range[:, None])
    if HAS_LSE:
        lse = (m_i + tl.math.log2(l_i)) * 0.6931471805599453
        lse = tl.where(l_i == 0.0, -float("inf"), lse)
        tl.store(lse_ptr + batch_head.to(tl.int64) * seqlen_q + offs_m, lse, mask=in_range)
