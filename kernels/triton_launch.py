"""The host side of a Triton call: which kernels are launched, with what."""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_table import CallKind, LaunchConfig, architecture, launch_config
from .mask import MAX_KEY_TILES, TILE, WORD_BITS, MustKeep, tiles
from .pooled import LOST_MIN, RAISED_MAX
from .precision import INT8_GUARD
from .triton_attention import attention_kernel
from .triton_int8 import MEAN_CHUNK, channel_sum_kernel, quantize_kernel
from .triton_pooled import summary_kernel
from .triton_tile_lists import expand_kernel
from .workspace import Workspace

_LOG2E = 1.0 / math.log(2.0)

_REUSES_COMPILED = triton.__version__.startswith("3.6.")
"""Versions whose compiled kernels are known to take their arguments as `_launch` passes them."""

COST_CLASSES = 16
COST_ORDER_MAX_TOKENS = 16384
"""Below this the last rows to start leave most of the GPU idle unless the longest start first; above it there are rows
enough, and the order of the heads, which share K and V in the cache, is worth more."""


class _Sizes(NamedTuple):
    """Numbers of one call that several launches need."""

    heads: int
    seqlen_q: int
    seqlen_k: int
    q_tiles: int
    k_tiles: int
    n_rows: int
    row_words: int
    list_stride: int


class _TileLists(NamedTuple):
    """What `expand_kernel` has made: the tile list of each row, and the rows in order of cost if cost_classes > 0."""

    table: Tensor
    lists: Tensor
    counts: Tensor
    order: Tensor
    turn: int
    cost_classes: int
    read_words: Tensor


class _StandIns(NamedTuple):
    """What `summary_kernel` has made of k and v, as `attention_kernel` takes it."""

    keys: Tensor
    values: Tensor
    moments: Tensor
    moment_scale: Tensor


SUMMARY_CHUNKS = 8
"""Programs that share the summary of a head; each leaves two float32 [D, D] to add up."""


def triton_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rows: list | None,
                     backwards: list[bool] | None, threshold: float, recording: bool, must_keep: MustKeep | None,
                     sm_scale: float, workspace: Workspace, computed: Tensor | None, *,
                     mass: bool = False, int8: bool = False, skip_now: bool = False, pool_skipped: bool = False,
                     config: LaunchConfig | None = None) -> None:
    """`lite_attention` after its checks: one launch without a mask, two with one, two more for INT8, one and a few
    small ones of torch for stand-ins; no host synchronisation. INT8 allocates its copies of q, k, v per call: kept
    between calls they would hold gigabytes that the rest of the model needs. Stand-ins allocate a hundredth of that.

    While recording, a launch that fails leaves the masks of `rows` reset: the expansion has already emptied them.

    Raises:
        ValueError: more keys than tile numbers.
        torch.OutOfMemoryError: no memory for the INT8 copies or the stand-ins; nothing was written.
    """
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    q_tiles, k_tiles = tiles(seqlen_q), tiles(seqlen_k)
    if k_tiles > MAX_KEY_TILES:
        raise ValueError(f"seqlen_k is {seqlen_k}; at most {MAX_KEY_TILES * TILE} keys have a tile number")
    sizes = _Sizes(heads, seqlen_q, seqlen_k, q_tiles, k_tiles, batch * heads * q_tiles, -(-k_tiles // WORD_BITS),
                   -(-k_tiles // 16) * 16)
    device = q.device
    arch = architecture(device)
    config = config or launch_config(CallKind(arch, head_dim, q.dtype, recording, int8))
    precision = "ieee" if arch.startswith("gfx") or q.dtype != torch.float32 else "tf32x3"
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        scales = out, out, out
        stand_ins = _summarize(k, v, precision, sizes, workspace) if pool_skipped else None
        if int8:
            threshold -= INT8_GUARD
            q, k, v, key_mean, *scales = _int8_copies(q, k, v, config.pv_fp16, workspace)
            if stand_ins is not None:
                stand_ins.keys.sub_(key_mean)
        lists = _TileLists(out, out, out, out, 0, 0, out)
        counted = None
        try:
            if rows is not None:
                lists = _expand(rows, backwards, recording, must_keep, workspace, computed, sizes, device, pool_skipped)
                counted = computed
            elif computed is not None:
                computed.view(-1)[:1].add_(sizes.n_rows * k_tiles)
            # The kernel does not know which tiles must stay: with such ranges every tile is computed. What this call
            # itself drops has no stand-in yet.
            branch = recording and skip_now and must_keep is None and config.branch and not mass and not pool_skipped
            _attend(q, k, v, out, lse, scales, lists, stand_ins, sizes, workspace, config,
                    (sm_scale * _LOG2E, 2.0 ** threshold if mass else threshold),
                    (rows is None, config.record if recording else 0, recording and mass, branch, int8), precision)
        except Exception:
            if counted is not None:
                with suppress(RuntimeError):  # a device that has failed refuses this too
                    counted.view(-1)[:1].sub_(lists.counts[:sizes.n_rows].sum())
            if recording:
                for m, _ in rows:
                    m.reset()
            raise


def _expand(rows: list, backwards: list[bool], recording: bool, must_keep: MustKeep | None, workspace: Workspace,
            computed: Tensor | None, sizes: _Sizes, device: torch.device, pool_skipped: bool) -> _TileLists:
    """First launch: mask bits to tile lists."""
    table = workspace.row_table(
        tuple([(m.words[r].data_ptr(), int(b)) for (m, r), b in zip(rows, backwards, strict=True)]), device)
    must = table if must_keep is None or not recording else workspace.must_words(
        must_keep, sizes.seqlen_q, sizes.seqlen_k, device)
    lists = workspace.buffer("list", sizes.n_rows * sizes.list_stride, torch.int16, device)
    counts = order = workspace.buffer("count", sizes.n_rows, torch.int32, device)
    read_words = counts
    if pool_skipped:
        read_words = workspace.buffer("words", sizes.n_rows * sizes.row_words, torch.int32, device)
    turn = cost_classes = 0
    if sizes.seqlen_q < COST_ORDER_MAX_TOKENS:
        cost_classes = COST_CLASSES
        order = workspace.cost_order((2 + sizes.n_rows) * COST_CLASSES, device)
        turn = workspace.cost_order_turn[device]
    _launch(workspace, expand_kernel, sizes.n_rows,
            () if computed is None else (computed,),
            (*(() if computed is not None else (table,)), table, must, lists, counts, order, read_words), (),
            (sizes.heads, sizes.n_rows, sizes.q_tiles, sizes.k_tiles, sizes.row_words, sizes.list_stride,
             0 if computed is None else computed.numel(), turn),
            (must is not table, sizes.seqlen_k % TILE != 0, recording, computed is not None, cost_classes,
             pool_skipped, 8 if sizes.row_words <= 8 else 32), 4, 2)
    if cost_classes:
        workspace.cost_order_turn[device] = 1 - turn
    return _TileLists(table, lists, counts, order, turn, cost_classes, read_words)


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scales: tuple[Tensor, Tensor, Tensor],
            lists: _TileLists, stand_ins: _StandIns | None, sizes: _Sizes, workspace: Workspace, config: LaunchConfig,
            factors: tuple[float, float], form: tuple[bool, int, bool, bool, bool], precision: str) -> None:
    """Last launch. factors: qk_scale and threshold; form: DENSE, RECORD, MASS, BRANCH, INT8 of `attention_kernel`."""
    dense, record, mass, branch, int8 = form
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    tma = config.tma and _has_descriptors(k) and _has_descriptors(v)
    if tma:
        k, v = _descriptor(k, config.BLOCK_N), _descriptor(v, config.BLOCK_N)
    head_dim = q.shape[-1]
    d_main = 64 if head_dim == 96 else head_dim
    _launch(workspace, attention_kernel, sizes.n_rows * (TILE // config.BLOCK_M),
            (q, k, v, out), (out if lse is None else lse, *scales, lists.table, lists.lists, lists.counts, lists.order,
                           lists.read_words, *(stand_ins or (out, out, out, out))), strides,
            (*factors, sizes.heads, sizes.n_rows, sizes.seqlen_q, sizes.seqlen_k, sizes.q_tiles, sizes.k_tiles,
             sizes.row_words, sizes.list_stride, lists.turn),
            (TILE, config.BLOCK_M, config.BLOCK_N, d_main, head_dim - d_main, dense, sizes.seqlen_k % TILE != 0,
             lists.cost_classes, record, mass, branch, tma, int8, int8 and config.pv_fp16, lse is not None,
             stand_ins is not None, LOST_MIN, RAISED_MAX, precision, config.num_stages),
            config.num_warps, config.num_stages)


def _launch(workspace: Workspace, kernel: JITFunction, programs: int, given: tuple[Tensor | TensorDescriptor, ...],
            own: tuple[Tensor, ...], strides: tuple[int, ...], scalars: tuple[int | float, ...], constants: tuple,
            num_warps: int, num_stages: int) -> None:
    """Launch a kernel with its parameters in order: tensors from outside, tensors allocated here, numbers, constants.
    Calls that Triton compiles alike go around its search for the compiled kernel, which costs 20 us each.

    Alike: device, types and alignment of what comes from outside, strides and constants agree. What is allocated here
    is aligned and has the type that the constants tell; the scalars are not specialised.
    """
    alike = (kernel.__name__, own[0].device, constants, strides, num_warps, num_stages,
             *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else (x.base.dtype, *x.block_shape)
               for x in given])
    compiled = workspace.compiled.get(alike)
    if compiled is not None:
        compiled[(programs, 1, 1)](*given, *own, *strides, *scalars, *constants)
        return
    compiled = kernel[(programs,)](*given, *own, *strides, *scalars, *constants, num_warps=num_warps,
                                   num_stages=num_stages)
    if _REUSES_COMPILED and isinstance(compiled, CompiledKernel):
        workspace.compiled[alike] = compiled


def _int8_copies(q: Tensor, k: Tensor, v: Tensor, v_fp16: bool, workspace: Workspace) -> tuple[Tensor, ...]:
    """q8, k8, v (a scaled float16 copy with `v_fp16`), the mean taken off k [B, H, 1, D], and the scales of the first
    three; see `quantize_kernel`."""
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    q_tiles, k_tiles = tiles(seqlen_q), tiles(seqlen_k)
    n_chunks = -(-seqlen_k // MEAN_CHUNK)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    q8, k8 = empty(torch.int8, seqlen_q, head_dim), empty(torch.int8, seqlen_k, head_dim)
    v16 = empty(torch.float16, seqlen_k, head_dim) if v_fp16 else v
    q_scale, k_scale = empty(torch.float32, q_tiles), empty(torch.float32, k_tiles)
    v_scale = empty(torch.float32, k_tiles) if v_fp16 else k_scale
    sums = empty(torch.float32, n_chunks, head_dim)
    d_padded = 64 if head_dim == 64 else 128
    _launch(workspace, channel_sum_kernel, batch * heads * n_chunks, (k,), (sums,), k.stride()[:3],
            (heads, seqlen_k, n_chunks), (MEAN_CHUNK, 64, head_dim, d_padded), 8, 2)
    _launch(workspace, quantize_kernel, batch * heads * max(q_tiles, k_tiles),
            (q, k, v), (sums, q8, k8, v16, q_scale, k_scale, v_scale),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            (heads, seqlen_q, seqlen_k, q_tiles, k_tiles, n_chunks), (TILE, head_dim, d_padded, v_fp16), 8, 2)
    return q8, k8, v16, sums.sum(2, keepdim=True).div_(seqlen_k), q_scale, k_scale, v_scale


def _summarize(k: Tensor, v: Tensor, precision: str, sizes: _Sizes, workspace: Workspace) -> _StandIns:
    """The stand-ins of the key tiles; see `summary_kernel`."""
    batch, heads, seqlen, head_dim = k.shape
    keys, values = (torch.empty(batch, heads, sizes.k_tiles, head_dim, dtype=k.dtype, device=k.device)
                    for _ in range(2))
    chunk_tiles = -(-sizes.k_tiles // SUMMARY_CHUNKS)
    n_chunks = -(-sizes.k_tiles // chunk_tiles)
    partial = torch.empty(batch, heads, n_chunks, 2, head_dim, head_dim, dtype=torch.float32, device=k.device)
    _launch(workspace, summary_kernel, batch * heads * n_chunks * 2, (k, v), (keys, values, partial),
            (*k.stride()[:3], *v.stride()[:3]), (heads, seqlen, sizes.k_tiles, n_chunks, chunk_tiles),
            (TILE, 64 if k.itemsize == 2 else 32, head_dim, 64 if head_dim == 64 else 128, precision), 8, 1)
    moments = partial.sum(2).div_(seqlen)
    # Divided by its largest element, a covariance fits into float16 whatever the range of k and v.
    largest = moments.abs().amax((-1, -2)).clamp_min_(1e-20)
    moments = moments.div_(largest[..., None, None]).to(k.dtype)
    return _StandIns(keys, values, moments, largest)


def _has_descriptors(x: Tensor) -> bool:
    """Whether TMA can load x [B, H, N, D]: 16-byte alignment, no broadcast, and a head_dim that is one block wide."""
    n_b, n_h, n_n, head_dim = x.shape
    s_b, s_h, s_n, _ = x.stride()
    aligned = 16 // x.itemsize
    return (head_dim in (64, 128) and x.data_ptr() % 16 == 0 and (n_b == 1 or (s_b > 0 and s_b % aligned == 0))
            and (n_h == 1 or (s_h > 0 and s_h % aligned == 0)) and (n_n == 1 or (s_n > 0 and s_n % aligned == 0)))


def _descriptor(x: Tensor, block_n: int) -> TensorDescriptor:
    n_b, n_h, n_n, head_dim = x.shape
    s_b, s_h, s_n, _ = x.stride()
    descriptor = object.__new__(TensorDescriptor)  # its own checks are those of `_has_descriptors`, at 7 us
    descriptor.base, descriptor.shape, descriptor.padding = x, [n_b, n_h, n_n, head_dim], "zero"
    # The stride of a dimension of one element is arbitrary; TMA wants it aligned all the same.
    descriptor.strides = [16 if n_b == 1 else s_b, 16 if n_h == 1 else s_h, 16 if n_n == 1 else s_n, 1]
    descriptor.block_shape = [1, 1, block_n, head_dim]
    return descriptor
