"""Each query tile's mask bits become an ordered list of key tiles and its length."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_heads", "seqlen_q", "seqlen_k", "n_counters"])
def tile_list_kernel(masks_ptr, must_ptr, lists_ptr, counts_ptr, computed_ptr,
                     n_heads, seqlen_q, seqlen_k, n_counters,
                     TILE: tl.constexpr, REWRITE: tl.constexpr, HAS_MUST: tl.constexpr, COUNTS: tl.constexpr,
                     CHUNK: tl.constexpr):
    """One program per (batch entry, head, query tile).

    masks_ptr: int64 [B, 2], address of the entry's mask words and its direction. must_ptr: int32 [QT, W].
    lists_ptr: int16 [B*H*QT, KT rounded up to 16]. counts_ptr: int32 [B*H*QT]. computed_ptr: int64 [n_counters], with
    COUNTS: each list's length is added to one of them. REWRITE empties the mask but for must-keep bits: the attention
    kernel ORs its keep decisions back in, so a call needs no second buffer; without it those ORs change nothing.
    """
    q_tiles = tl.cdiv(seqlen_q, TILE)
    k_tiles = tl.cdiv(seqlen_k, TILE)
    words_per_list = tl.cdiv(k_tiles, 32)
    pid = tl.program_id(0)
    query_tile = pid % q_tiles
    batch_head = pid // q_tiles
    batch_entry = batch_head // n_heads
    head = batch_head % n_heads
    partial = tl.where(seqlen_k % TILE == 0, -1, k_tiles - 1)  # the key tile that is not whole
    offs_bit = tl.arange(0, 32)
    address = tl.load(masks_ptr + 2 * batch_entry)
    backwards = tl.load(masks_ptr + 2 * batch_entry + 1) != 0
    words_ptr = address.to(tl.pointer_type(tl.int32)) + (head * q_tiles + query_tile).to(tl.int64) * words_per_list

    # The length of the middle part is needed before its first position is known when the order is descending.
    n_own = 0
    n_middle = 0
    n_partial = 0
    for first_word in range(0, words_per_list, CHUNK):
        offs_word = first_word + tl.arange(0, CHUNK)
        words = tl.load(words_ptr + offs_word, mask=offs_word < words_per_list, other=0)
        tile = offs_word[:, None] * 32 + offs_bit[None, :]
        bit = ((words[:, None] >> offs_bit[None, :]) & 1) * (tile < k_tiles).to(tl.int32)
        is_partial = tile == partial
        is_own = (tile == query_tile) & (is_partial == 0)
        n_partial += tl.sum(tl.sum(tl.where(is_partial, bit, 0), 1), 0)
        n_own += tl.sum(tl.sum(tl.where(is_own, bit, 0), 1), 0)
        n_middle += tl.sum(tl.sum(tl.where(is_partial | is_own, 0, bit), 1), 0)
    n_active = n_own + n_middle + n_partial
    tl.store(counts_ptr + pid, n_active)
    if COUNTS:
        tl.atomic_add(computed_ptr + pid % n_counters, n_active.to(tl.int64), sem="relaxed")

    seen = 0
    list_ptr = lists_ptr + pid.to(tl.int64) * (tl.cdiv(k_tiles, 16) * 16)
    for first_word in range(0, words_per_list, CHUNK):
        offs_word = first_word + tl.arange(0, CHUNK)
        words = tl.load(words_ptr + offs_word, mask=offs_word < words_per_list, other=0)
        bit = tl.reshape((words[:, None] >> offs_bit[None, :]) & 1, [CHUNK * 32])
        tile = first_word * 32 + tl.arange(0, CHUNK * 32)
        bit = bit * (tile < k_tiles).to(tl.int32)
        is_partial = tile == partial
        is_own = (tile == query_tile) & (is_partial == 0)
        middle = tl.where(is_partial | is_own, 0, bit)
        rank = seen + tl.cumsum(middle, 0) - middle
        rank = tl.where(backwards, n_middle - 1 - rank, rank)
        position = tl.where(is_own, 0, tl.where(is_partial, n_own + n_middle, n_own + rank))
        tl.store(list_ptr + position, tile.to(tl.int16), mask=bit != 0)
        seen += tl.sum(middle, 0)
    if REWRITE:
        # A loop of its own behind a barrier: replicated loads of another warp must not see rewritten words above,
        # and read-and-store twice gives the same here.
        tl.debug_barrier()
        for first_word in range(0, words_per_list, CHUNK):
            offs_word = first_word + tl.arange(0, CHUNK)
            in_list = offs_word < words_per_list
            words = tl.zeros([CHUNK], tl.int32)
            if HAS_MUST:
                must = tl.load(must_ptr + query_tile.to(tl.int64) * words_per_list + offs_word, mask=in_list, other=0)
                words = tl.load(words_ptr + offs_word, mask=in_list, other=0) & must
            tl.store(words_ptr + offs_word, words, mask=in_list)
