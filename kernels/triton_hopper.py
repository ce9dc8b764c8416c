"""The attention kernel for Hopper (sm_90) in Gluon: one warp loads, two groups of four compute 64 query rows each.

As in FlashAttention-3 (arXiv 2407.08608, section 3.2), each group has the next scores' product and the last weights'
product in flight while it computes a softmax. What Triton's own pipeline makes of `triton_attention.py` waits for each
product where it is issued.

A key or value tile in shared memory has two barriers there: `ready`, completed by the copy, and `free`, by both groups.
The n-th use of a barrier is its phase n % 2; a fresh barrier counts as having completed a phase 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)
"""Query rows of one group."""


@gluon.jit
def _softmax(s, m_i, l_i, n_left, tile, flags_ptr, votes, qk_scale, threshold, MASKED: gl.constexpr,
             RECORD: gl.constexpr, MASS: gl.constexpr, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """Weights of one tile of scores [ROWS, TILE], what the sums so far are to be multiplied by, m_i and l_i with it.

    The rule is that of `_attend` in `triton_attention.py`. Each row that keeps the tile stores the same byte.
    """
    if MASKED:
        keys = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where((keys < n_left)[None, :], s, -float("inf"))
    tile_max = gl.max(s, 1) * qk_scale
    m_new = gl.maximum(m_i, tile_max)
    m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)
    p = gl.exp2(s * qk_scale - m_safe[:, None])
    alpha = gl.exp2(m_i - m_safe)
    mass = gl.sum(p, 1)
    l_i = l_i * alpha + mass
    if RECORD:
        if MASS:
            stays = gl.where((mass <= threshold * l_i) & (l_i > 0), 0, votes)
        else:
            stays = gl.where((tile_max - m_i <= threshold) & (l_i == l_i), 0, votes)
        gl.store(flags_ptr + tile + votes * 0, (votes * 0 + 1).to(gl.int8), mask=stays != 0)
    return gl.convert_layout(p.to(DTYPE), WEIGHTS), alpha, m_new, l_i


@gluon.jit
def _compute(GROUP: gl.constexpr, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free, list_ptr,
             flags_ptr, out_ptr, lse_ptr, row_threshold_ptr, pooled_lse_ptr, stride_on, qk_scale, threshold, seqlen_q,
             first_row, n_active, n_listed, n_partial, n_last, n_k_tiles, STAGES: gl.constexpr, RAGGED: gl.constexpr,
             RECORD: gl.constexpr, MASS: gl.constexpr, HAS_LSE: gl.constexpr, POOLED: gl.constexpr):
    """A group's rows: the softmax of a tile runs between the products before and after it."""
    TILE: gl.constexpr = k_tiles.shape[3]
    D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    offs_m = first_row + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    # Rows past the end are zeros here, and an empty list still has a tile of zeros: neither decides on anything.
    votes = ((offs_m < seqlen_q) & (n_active > 0)).to(gl.int32)
    if POOLED:
        threshold = gl.load(row_threshold_ptr + gl.minimum(offs_m, seqlen_q - 1))
    q = q_tiles.index(GROUP).reshape([ROWS, D])
    m_i = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    zeros = gl.zeros([ROWS, TILE], gl.float32, SCORES)
    acc = gl.zeros([ROWS, D], gl.float32, OUT)

    mbarrier.wait(q_ready.index(GROUP), 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(q, k_tiles.index(0).reshape([TILE, D]).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(0), count=1)
    tile = gl.load(list_ptr, mask=n_active > 0, other=0).to(gl.int32)
    n_left = gl.where(n_listed > n_partial, TILE, n_last)
    weights, alpha, m_i, l_i = _softmax(s, m_i, l_i, n_left, tile, flags_ptr, votes, qk_scale, threshold, True, RECORD,
                                        MASS, WEIGHTS, DTYPE)
    mbarrier.wait(k_ready.index(1 % STAGES), 1 // STAGES, pred=n_listed > 1)
    for i in range(1, gl.maximum(n_listed - n_partial, 1)):
        slot = i % STAGES
        last_slot = (i - 1) % STAGES
        if RECORD:
            tile = gl.load(list_ptr + i).to(gl.int32)
        scores = warpgroup_mma(q, k_tiles.index(slot).reshape([TILE, D]).permute((1, 0)), zeros, use_acc=False,
                               is_async=True)
        mbarrier.wait(v_ready.index(last_slot), (i - 1) // STAGES % 2)
        product = warpgroup_mma(weights, v_tiles.index(last_slot).reshape([TILE, D]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_free.index(slot), count=1)
        next_weights, alpha, m_i, l_i = _softmax(s, m_i, l_i, TILE, tile, flags_ptr, votes, qk_scale, threshold, False,
                                                 RECORD, MASS, WEIGHTS, DTYPE)
        # Waiting for the next keys here, and not where they are needed, ends a basic block: in one with the softmax
        # the assembler moves the wait for the product ahead of the exponentials, and nothing overlaps.
        mbarrier.wait(k_ready.index((i + 1) % STAGES), (i + 1) // STAGES % 2, pred=i + 1 < n_listed)
        acc, weights = warpgroup_mma_wait(0, deps=(product, weights))
        mbarrier.arrive(v_free.index(last_slot), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        weights = next_weights
    if RAGGED:
        # The partial tile comes last, so nobody waits for the buffers of this and the last but one. A loop of none or
        # one and not a branch, in which the products would not be asynchronous.
        for i in range(gl.maximum(n_listed - n_partial, 1), n_listed):
            slot = i % STAGES
            last_slot = (i - 1) % STAGES
            scores = warpgroup_mma(q, k_tiles.index(slot).reshape([TILE, D]).permute((1, 0)), zeros, use_acc=False,
                                   is_async=True)
            mbarrier.wait(v_ready.index(last_slot), (i - 1) // STAGES % 2)
            product = warpgroup_mma(weights, v_tiles.index(last_slot).reshape([TILE, D]), acc, is_async=True)
            s, acc, weights = warpgroup_mma_wait(0, deps=(scores, product, weights))
            weights, alpha, m_i, l_i = _softmax(s, m_i, l_i, n_last, n_k_tiles - 1, flags_ptr, votes, qk_scale,
                                                threshold, True, RECORD, MASS, WEIGHTS, DTYPE)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    last_slot = (n_listed - 1) % STAGES
    mbarrier.wait(v_ready.index(last_slot), (n_listed - 1) // STAGES % 2)
    product = warpgroup_mma(weights, v_tiles.index(last_slot).reshape([TILE, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(product,))

    rows = first_row + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
    offs_d = gl.arange(0, D, layout=gl.SliceLayout(0, STORED))
    out_rows = out_ptr + rows[:, None].to(gl.int64) * stride_on + offs_d[None, :]
    in_range = rows < seqlen_q
    acc = acc * gl.convert_layout(1.0 / gl.where(l_i == 0.0, 1.0, l_i), gl.SliceLayout(1, OUT))[:, None]
    lse = gl.where(l_i == 0.0, -float("inf"), m_i + gl.log2(l_i))
    if POOLED:
        if n_active < n_k_tiles:
            pooled = gl.convert_layout(gl.load(out_rows, mask=in_range[:, None], other=0.0), OUT).to(gl.float32)
            pooled_lse = gl.load(pooled_lse_ptr + offs_m, mask=offs_m < seqlen_q, other=0.0)
            top = gl.maximum(lse, pooled_lse)
            top = gl.where(top == -float("inf"), 0.0, top)
            exact_weight = gl.exp2(lse - top)
            pooled_weight = gl.exp2(pooled_lse - top)
            total = exact_weight + pooled_weight
            acc = acc * gl.convert_layout(exact_weight / total, gl.SliceLayout(1, OUT))[:, None]
            acc += pooled * gl.convert_layout(pooled_weight / total, gl.SliceLayout(1, OUT))[:, None]
            lse = top + gl.log2(total)
    gl.store(out_rows, gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORED), mask=in_range[:, None])
    if HAS_LSE:
        gl.store(lse_ptr + offs_m, lse * 0.6931471805599453, mask=offs_m < seqlen_q)


@gluon.jit
def _load(q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free, list_ptr,
          batch_entry, head, first_row, n_active, n_listed, n_k_tiles, STAGES: gl.constexpr):
    """One warp: the query rows of both groups, then the tiles of the list, values one tile behind keys."""
    TILE: gl.constexpr = k_tiles.shape[3]
    for group in gl.static_range(2):
        mbarrier.expect(q_ready.index(group), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [batch_entry, head, first_row + group * ROWS, 0], q_ready.index(group),
                                        q_tiles.index(group))
    key = 0
    for i in range(0, n_listed):
        last_key = key
        # A tile past the end comes as zeros.
        key = gl.load(list_ptr + i, mask=n_active > 0, other=n_k_tiles).to(gl.int32) * TILE
        slot = i % STAGES
        mbarrier.wait(k_free.index(slot), i // STAGES % 2 ^ 1)
        mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [batch_entry, head, key, 0], k_ready.index(slot), k_tiles.index(slot))
        if i > 0:
            slot = (i - 1) % STAGES
            mbarrier.wait(v_free.index(slot), (i - 1) // STAGES % 2 ^ 1)
            mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [batch_entry, head, last_key, 0], v_ready.index(slot),
                                            v_tiles.index(slot))
    slot = (n_listed - 1) % STAGES
    mbarrier.wait(v_free.index(slot), (n_listed - 1) // STAGES % 2 ^ 1)
    mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [batch_entry, head, key, 0], v_ready.index(slot), v_tiles.index(slot))


@gluon.jit(do_not_specialize=["qk_scale", "threshold", "n_heads", "seqlen_q", "seqlen_k"])
def hopper_attention_kernel(q_desc, k_desc, v_desc, out_ptr, lse_ptr, lists_ptr, counts_ptr, order_ptr, flags_ptr,
                            row_threshold_ptr, pooled_lse_ptr, stride_ob, stride_oh, stride_on, qk_scale, threshold,
                            n_heads, seqlen_q, seqlen_k, TILE: gl.constexpr, STAGES: gl.constexpr,
                            RAGGED: gl.constexpr, RECORD: gl.constexpr, MASS: gl.constexpr, HAS_LSE: gl.constexpr,
                            POOLED: gl.constexpr):
    """One program of nine warps per (batch entry, head, query tile); arguments as in `attention_kernel`.

    q_desc, k_desc, v_desc: tensor descriptors of blocks [1, 1, ROWS or TILE, D]. flags: int8 [B*H*QT, KT rounded up
    to 16], zeros; with RECORD, 1 where the list's tile stays, for `pack_kernel`.
    """
    n_q_tiles = gl.cdiv(seqlen_q, TILE)
    n_k_tiles = gl.cdiv(seqlen_k, TILE)
    list_index = gl.load(order_ptr + gl.program_id(0)).to(gl.int32)
    batch_head = list_index // n_q_tiles
    batch_entry = batch_head // n_heads
    head = batch_head % n_heads
    first_row = list_index % n_q_tiles * TILE
    row_offset = gl.cdiv(n_k_tiles, 16) * 16 * list_index.to(gl.int64)
    lse_offset = batch_head.to(gl.int64) * seqlen_q
    list_ptr = lists_ptr + row_offset
    if RECORD:
        flags_ptr += row_offset
    if HAS_LSE:
        lse_ptr += lse_offset
    if POOLED:
        row_threshold_ptr += lse_offset
        pooled_lse_ptr += lse_offset
    out_ptr += batch_entry.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    n_active = gl.load(counts_ptr + list_index)
    n_listed = gl.maximum(n_active, 1)
    n_last = gl.where(n_active > 0, seqlen_k - (n_k_tiles - 1) * TILE, 0)
    n_partial = (n_active == 0).to(gl.int32)
    if RAGGED:
        last = gl.load(list_ptr + n_listed - 1, mask=n_active > 0, other=0).to(gl.int32)
        n_partial = ((n_active == 0) | (last == n_k_tiles - 1)).to(gl.int32)

    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for group in gl.static_range(2):
        mbarrier.init(q_ready.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_compute, (0, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free, list_ptr,
                    flags_ptr, out_ptr, lse_ptr, row_threshold_ptr, pooled_lse_ptr, stride_on, qk_scale, threshold,
                    seqlen_q, first_row, n_active, n_listed, n_partial, n_last, n_k_tiles, STAGES, RAGGED, RECORD, MASS,
                    HAS_LSE, POOLED)),
        (_compute, (1, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free, list_ptr,
                    flags_ptr, out_ptr, lse_ptr, row_threshold_ptr, pooled_lse_ptr, stride_on, qk_scale, threshold,
                    seqlen_q, first_row, n_active, n_listed, n_partial, n_last, n_k_tiles, STAGES, RAGGED, RECORD, MASS,
                    HAS_LSE, POOLED)),
        (_load, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free, list_ptr,
                 batch_entry, head, first_row, n_active, n_listed, n_k_tiles, STAGES)),
    ], [4, 1], [240, 24])


@triton.jit(do_not_specialize=["n_heads", "seqlen_q", "seqlen_k"])
def pack_kernel(flags_ptr, masks_ptr, n_heads, seqlen_q, seqlen_k, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """After `hopper_attention_kernel`: its flags become bits of the masks, which hold the must-keep bits and no others.

    One program per (batch entry, head, query tile); masks as in `tile_list_kernel`.
    """
    q_tiles = tl.cdiv(seqlen_q, TILE)
    k_tiles = tl.cdiv(seqlen_k, TILE)
    words_per_list = tl.cdiv(k_tiles, 32)
    pid = tl.program_id(0)
    batch_head = pid // q_tiles
    words_ptr = tl.load(masks_ptr + 2 * (batch_head // n_heads)).to(tl.pointer_type(tl.int32)) + (
        (batch_head % n_heads).to(tl.int64) * q_tiles + pid % q_tiles) * words_per_list
    flags_ptr += pid.to(tl.int64) * (tl.cdiv(k_tiles, 16) * 16)
    offs_bit = tl.arange(0, 32)
    for first_word in range(0, words_per_list, CHUNK):
        offs_word = first_word + tl.arange(0, CHUNK)
        in_list = offs_word < words_per_list
        tile = offs_word[:, None] * 32 + offs_bit[None, :]
        flag = tl.load(flags_ptr + tile, mask=tile < k_tiles, other=0).to(tl.int32)
        words = tl.load(words_ptr + offs_word, mask=in_list, other=0) | tl.sum(flag << offs_bit[None, :], 1)
        tl.store(words_ptr + offs_word, words, mask=in_list)
