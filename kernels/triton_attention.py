"""Second launch of a call: attention over each query tile's list of key tiles, recording keep decisions."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, architecture, launch_config
from .mask import MAX_KEY_TILES, TILE, MustKeep, mask_shape, tiles
from .triton_expand import expand_kernel
from .workspace import Workspace

_LOG2E = 1.0 / math.log(2.0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _accumulate(q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, m_i, l_i, n_left, tile, row_bits, word, words_ptr,
                qk_scale, threshold,
                BLOCK_N: tl.constexpr, D_TAIL: tl.constexpr, PARTIAL: tl.constexpr, RECORD: tl.constexpr,
                PRECISION: tl.constexpr):
    """One compute tile of the online softmax. m_i, threshold: log2; l_i: running sum of 2^(s - m_i)."""
    s = tl.dot(q, k, input_precision=PRECISION)
    if D_TAIL:
        s = tl.dot(q_tail, k_tail, s, input_precision=PRECISION)
    if PARTIAL:
        s = tl.where((tl.arange(0, BLOCK_N) < n_left)[None, :], s, -float("inf"))
    tile_max = tl.max(s, 1) * qk_scale
    m_new = tl.maximum(m_i, tile_max)
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row of nothing but -inf so far: avoid inf - inf
    p = tl.math.exp2(s * qk_scale - m_safe[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    if RECORD > 0:
        # The reference may move between the compute tiles of one mask tile without changing its decision: a row that
        # moved it has voted to keep. Dropped only if at or below the threshold in numbers that compare: NaN and Inf
        # (l_i is NaN then) keep.
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
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if D_TAIL:
        acc_tail = acc_tail * alpha[:, None]
        acc_tail = tl.dot(p.to(v.dtype), v_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail, m_new, l_i, row_bits, word


@triton.jit(do_not_specialize=["qk_scale", "threshold", "n_heads", "seqlen_q", "seqlen_k", "q_tiles", "k_tiles",
                               "row_words", "list_stride"])
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, list_ptr, count_ptr, qk_scale, threshold,
                     stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                     stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
                     n_heads, seqlen_q, seqlen_k, q_tiles, k_tiles, row_words, list_stride,
                     TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D_MAIN: tl.constexpr,
                     D_TAIL: tl.constexpr, RAGGED: tl.constexpr, RECORD: tl.constexpr, HAS_LSE: tl.constexpr,
                     PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr):
    """One program per (batch row, head, BLOCK_M query rows), query tile fastest so that a head's K, V stay in L2.

    Pointers as in `expand_kernel`; q, k, v, out are [B, H, N, D_MAIN + D_TAIL] with unit last stride. Row, head
    and batch offsets are int64; offsets within a compute tile are int32.
    """
    M_PARTS: tl.constexpr = TILE // BLOCK_M
    N_PARTS: tl.constexpr = TILE // BLOCK_N
    pid = tl.program_id(0)
    mask_row = pid // M_PARTS
    q_tile = mask_row % q_tiles
    batch_head = mask_row // q_tiles
    batch = (batch_head // n_heads).to(tl.int64)
    head = (batch_head % n_heads).to(tl.int64)
    offs_m = q_tile * TILE + (pid % M_PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D_MAIN)
    # Rows past the end repeat the last valid row: their votes are its votes, so no mask is needed in the loop.
    q_rows = q_ptr + batch * stride_qb + head * stride_qh + tl.minimum(offs_m, seqlen_q - 1).to(tl.int64) * stride_qn
    k_base = k_ptr + batch * stride_kb + head * stride_kh
    v_base = v_ptr + batch * stride_vb + head * stride_vh
    q = tl.load(q_rows[:, None] + offs_d[None, :])
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
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    row_bits = tl.zeros([BLOCK_M], tl.int32)
    word = 0
    words_ptr = count_ptr
    if RECORD > 0:
        words_ptr = tl.load(rows_ptr + 2 * batch).to(tl.pointer_type(tl.int32)) + (
            (head * q_tiles + q_tile) * row_words)
    row_list_ptr = list_ptr + mask_row.to(tl.int64) * list_stride
    n_whole = tl.load(count_ptr + mask_row)
    n_tail = 0
    if RAGGED:
        final = tl.load(row_list_ptr + tl.maximum(n_whole - 1, 0)).to(tl.int32)
        n_tail = ((n_whole > 0) & (final == k_tiles - 1)).to(tl.int32)
        n_whole -= n_tail

    for i in tl.range(0, n_whole * N_PARTS, num_stages=NUM_STAGES):
        tile = tl.load(row_list_ptr + i // N_PARTS).to(tl.int32)
        start_n = (tile * TILE + (i % N_PARTS) * BLOCK_N).to(tl.int64)
        k = tl.load(k_base + start_n * stride_kn + k_offs)
        v = tl.load(v_base + start_n * stride_vn + v_offs)
        k_tail = k
        v_tail = v
        if D_TAIL:
            k_tail = tl.load(k_base + start_n * stride_kn + k_tail_offs)
            v_tail = tl.load(v_base + start_n * stride_vn + v_tail_offs)
        acc, acc_tail, m_i, l_i, row_bits, word = _accumulate(
            q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, m_i, l_i, BLOCK_N, tile, row_bits, word, words_ptr,
            qk_scale, threshold, BLOCK_N, D_TAIL, False, RECORD, PRECISION)
    if RAGGED:
        # After the main loop and not inside it: a mask in there costs a quarter more instructions.
        tile = k_tiles - 1
        for i in tl.range(0, n_tail * tl.cdiv(seqlen_k - tile * TILE, BLOCK_N), num_stages=1):
            start_n = (tile * TILE + i * BLOCK_N).to(tl.int64)
            n_left = seqlen_k - tile * TILE - i * BLOCK_N
            k = tl.load(k_base + start_n * stride_kn + k_offs, mask=(offs_n < n_left)[None, :], other=0.0)
            v = tl.load(v_base + start_n * stride_vn + v_offs, mask=(offs_n < n_left)[:, None], other=0.0)
            k_tail = k
            v_tail = v
            if D_TAIL:
                k_tail = tl.load(k_base + start_n * stride_kn + k_tail_offs, mask=(offs_n < n_left)[None, :], other=0.0)
                v_tail = tl.load(v_base + start_n * stride_vn + v_tail_offs, mask=(offs_n < n_left)[:, None], other=0.0)
            acc, acc_tail, m_i, l_i, row_bits, word = _accumulate(
                q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, m_i, l_i, n_left, tile, row_bits, word, words_ptr,
                qk_scale, threshold, BLOCK_N, D_TAIL, True, RECORD, PRECISION)
    if RECORD == 3:
        tl.atomic_or(words_ptr + word, tl.reduce(row_bits, 0, _or), sem="relaxed")

    inverse = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)  # an empty list gives 0, not 0 / 0
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
        tl.store(lse_ptr + (batch * n_heads + head) * seqlen_q + offs_m, lse, mask=in_range)


def triton_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rows: list | None,
                     backwards: list[bool] | None, threshold: float, recording: bool, must_keep: MustKeep | None,
                     sm_scale: float, workspace: Workspace, computed: Tensor | None,
                     config: LaunchConfig | None = None) -> None:
    """`lite_attention` after its checks: two launches, no host synchronisation.

    While recording, a launch that fails leaves the masks of `rows` reset: the expansion has already emptied them.
    """
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    _, _, q_tiles, row_words = mask_shape(batch, heads, seqlen_q, seqlen_k)
    k_tiles = tiles(seqlen_k)
    if k_tiles > MAX_KEY_TILES:
        raise ValueError(f"seqlen_k is {seqlen_k}; at most {MAX_KEY_TILES * TILE} keys have a tile number")
    device = q.device
    config = config or launch_config(architecture(device), head_dim, q.dtype)
    n_rows = batch * heads * q_tiles
    list_stride = -(-k_tiles // 16) * 16
    lists = workspace.buffer("list", n_rows * list_stride, torch.int16, device)
    counts = workspace.buffer("count", n_rows, torch.int32, device)
    table = counts if rows is None else workspace.row_table(
        tuple((m.words[r].data_ptr(), int(back)) for (m, r), back in zip(rows, backwards, strict=True)), device)
    must = counts if must_keep is None or not recording else workspace.must_words(
        must_keep, seqlen_q, seqlen_k, device)
    d_main = 64 if head_dim == 96 else head_dim
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            expand_kernel[(n_rows,)](
                table, must, lists, counts, heads, q_tiles, k_tiles, row_words, list_stride,
                HAS_MASK=rows is not None, HAS_MUST=must is not counts, RAGGED=seqlen_k % TILE != 0,
                REWRITE=recording, CHUNK=8 if row_words <= 8 else 32, num_warps=4)
            attention_kernel[(n_rows * (TILE // config.BLOCK_M),)](
                q, k, v, out, out if lse is None else lse, table, lists, counts, sm_scale * _LOG2E, threshold,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                heads, seqlen_q, seqlen_k, q_tiles, k_tiles, row_words, list_stride,
                TILE=TILE, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, D_MAIN=d_main, D_TAIL=head_dim - d_main,
                RAGGED=seqlen_k % TILE != 0, RECORD=config.record if recording else 0, HAS_LSE=lse is not None,
                PRECISION="ieee" if torch.version.hip or q.dtype != torch.float32 else "tf32x3",
                NUM_STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages)
    except Exception:
        if recording:
            for m, _ in rows:
                m.reset()
        raise
    if computed is not None:
        computed += counts[:n_rows].sum()
