"""First launch of a call: each query tile's mask bits become an ordered list of key tiles and its length."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_heads", "n_rows", "q_tiles", "k_tiles", "row_words", "list_stride", "slots",
                               "order_turn"])
def expand_kernel(computed_ptr, rows_ptr, must_ptr, list_ptr, count_ptr, order_ptr, read_words_ptr,
                  n_heads, n_rows, q_tiles, k_tiles, row_words, list_stride, slots, order_turn,
                  HAS_MUST: tl.constexpr, RAGGED: tl.constexpr, REWRITE: tl.constexpr, COUNTS: tl.constexpr,
                  COST_CLASSES: tl.constexpr, READ_WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """One program per (batch row, head, query tile).

    rows_ptr: int64 [B, 2], address of the row's mask words and its direction. must_ptr: int32 [QT, W].
    list_ptr: int16 [B*H*QT, list_stride]. count_ptr: int32 [B*H*QT]. REWRITE leaves only must-keep bits in the
    mask: the attention kernel ORs its keep decisions back in, so a call needs no second buffer.
    read_words_ptr: int32 [B*H*QT, row_words], with READ_WORDS: a copy of the words as this call reads them.
    computed_ptr: int64 [slots], with COUNTS: each row's count is added to one of them.
    order_ptr: int32, with COST_CLASSES: two tables of class sizes, of which this call uses number order_turn, zero
    before it, and empties the other for the next call; then the rows of each class, [classes, B*H*QT]. Class 0 holds
    the longest lists. The order within a class is that of arrival: it decides when a row is computed, nothing else.
    """
    pid = tl.program_id(0)
    own = pid % q_tiles
    batch_head = pid // q_tiles
    batch = batch_head // n_heads
    head = batch_head % n_heads
    row = pid.to(tl.int64)
    last = k_tiles - 1
    offs_bit = tl.arange(0, 32)
    address = tl.load(rows_ptr + 2 * batch)
    backwards = tl.load(rows_ptr + 2 * batch + 1) != 0
    words_ptr = address.to(tl.pointer_type(tl.int32)) + (head * q_tiles + own).to(tl.int64) * row_words

    # The length of the middle part is needed before its first position is known when the order is descending.
    n_own = 0
    n_middle = 0
    n_tail = 0
    for first_word in range(0, row_words, CHUNK):
        offs_word = first_word + tl.arange(0, CHUNK)
        words = tl.load(words_ptr + offs_word, mask=offs_word < row_words, other=0)
        if READ_WORDS:
            tl.store(read_words_ptr + row * row_words + offs_word, words, mask=offs_word < row_words)
        tile = offs_word[:, None] * 32 + offs_bit[None, :]
        bit = ((words[:, None] >> offs_bit[None, :]) & 1) * (tile < k_tiles).to(tl.int32)
        is_tail = (tile == last) & RAGGED
        is_own = (tile == own) & (is_tail == 0)
        n_tail += tl.sum(tl.sum(tl.where(is_tail, bit, 0), 1), 0)
        n_own += tl.sum(tl.sum(tl.where(is_own, bit, 0), 1), 0)
        n_middle += tl.sum(tl.sum(tl.where(is_tail | is_own, 0, bit), 1), 0)
    n_active = n_own + n_middle + n_tail
    tl.store(count_ptr + row, n_active)
    if COUNTS:
        tl.atomic_add(computed_ptr + pid % slots, n_active.to(tl.int64), sem="relaxed")
    if COST_CLASSES > 0:
        cost_class = COST_CLASSES - 1 - tl.minimum(n_active * COST_CLASSES // k_tiles, COST_CLASSES - 1)
        arrived = tl.atomic_add(order_ptr + order_turn * COST_CLASSES + cost_class, 1, sem="relaxed")
        tl.store(order_ptr + 2 * COST_CLASSES + cost_class.to(tl.int64) * n_rows + arrived, pid)
        if pid == 0:
            tl.store(order_ptr + (1 - order_turn) * COST_CLASSES + tl.arange(0, COST_CLASSES),
                     tl.zeros([COST_CLASSES], tl.int32))

    seen = 0
    row_list_ptr = list_ptr + row * list_stride
    for first_word in range(0, row_words, CHUNK):
        offs_word = first_word + tl.arange(0, CHUNK)
        words = tl.load(words_ptr + offs_word, mask=offs_word < row_words, other=0)
        bit = tl.reshape((words[:, None] >> offs_bit[None, :]) & 1, [CHUNK * 32])
        tile = first_word * 32 + tl.arange(0, CHUNK * 32)
        bit = bit * (tile < k_tiles).to(tl.int32)
        is_tail = (tile == last) & RAGGED
        is_own = (tile == own) & (is_tail == 0)
        middle = tl.where(is_tail | is_own, 0, bit)
        rank = seen + tl.cumsum(middle, 0) - middle
        rank = tl.where(backwards, n_middle - 1 - rank, rank)
        position = tl.where(is_own, 0, tl.where(is_tail, n_own + n_middle, n_own + rank))
        tl.store(row_list_ptr + position, tile.to(tl.int16), mask=bit != 0)
        seen += tl.sum(middle, 0)
    if REWRITE:
        # A loop of its own behind a barrier: replicated loads of another warp must not see rewritten words above,
        # and read-and-store twice gives the same here.
        tl.debug_barrier()
        for first_word in range(0, row_words, CHUNK):
            offs_word = first_word + tl.arange(0, CHUNK)
            in_row = offs_word < row_words
            words = tl.zeros([CHUNK], tl.int32)
            if HAS_MUST:
                must = tl.load(must_ptr + own.to(tl.int64) * row_words + offs_word, mask=in_row, other=0)
                words = tl.load(words_ptr + offs_word, mask=in_row, other=0) & must
            tl.store(words_ptr + offs_word, words, mask=in_row)
