"""The host side of a Triton call: which kernels are launched, with what."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_table import LaunchConfig, architecture, launch_config
from .mask import TILE, WORD_BITS, MustKeep, tiles
from .pooled import LOST_MIN, RAISED_MAX
from .precision import INT8_GUARD
from .triton_attention import attention_kernel
from .triton_hopper_launch import attend_hopper, hopper_descriptors, takes_hopper
from .triton_int8 import CHUNK, Q_CHUNK, balance_kernel, channel_sum_kernel, quantize_kernel
from .triton_pooled import pool_kernel, pooled_attention_kernel
from .triton_tile_lists import tile_list_kernel
from .workspace import Workspace

_LOG2E = 1.0 / math.log(2.0)

COST_ORDER_MAX_TOKENS = 16384
"""Below this the last programs to start leave most of the GPU idle unless the longest lists start first; above it there
are programs enough, and the order of the heads, which share K and V in the cache, is worth more."""

POOL_CHUNKS = 8
"""Programs that share the pooling of a head; each adds up two float32 [D, D]."""


class _TileLists(NamedTuple):
    """What `tile_list_kernel` has made, as `attention_kernel` takes it."""

    lists_ptr: Tensor
    counts_ptr: Tensor

    def order(self, workspace: Workspace, seqlen_q: int) -> Tensor:
        """int64, all lists in the order in which programs take them."""
        if seqlen_q < COST_ORDER_MAX_TOKENS:
            return self.counts_ptr.argsort(descending=True, stable=True)
        return workspace.in_order(self.counts_ptr.numel(), self.counts_ptr.device)


class _Pooled(NamedTuple):
    """What `pooled_attention_kernel` has made, as `attention_kernel` takes it."""

    row_threshold_ptr: Tensor | None = None
    pooled_lse_ptr: Tensor | None = None


class _Int8(NamedTuple):
    """What `_int8_copies` has made: q and k in INT8, v or a scaled float16 copy of it, the scales of the three, and the
    mean [B, H, 1, D] that was taken off k."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor | None
    key_mean: Tensor


def triton_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, entries: list,
                     backwards: list[bool], threshold: float, recording: bool, must_keep: MustKeep | None,
                     sm_scale: float, workspace: Workspace, computed: Tensor | None, *,
                     mass: bool = False, int8: bool = False, pool_skipped: bool = False,
                     config: LaunchConfig | None = None, hopper: bool | None = None) -> None:
    """`lite_attention` after its checks: two launches and a sort, three launches more for INT8, two and a few small
    ones of torch for pooled keys; no host synchronisation. INT8 allocates its copies of q, k, v per call: kept between
    calls they would hold gigabytes that the rest of the model needs. Pooled keys allocate a hundredth of that.

    While recording, a launch that fails leaves the masks of `entries` reset: the tile lists' launch has emptied them.

    Args:
        config: instead of the table's.
        hopper: take the kernel for Hopper where strides allow it; None where `takes_hopper` says so.

    Raises:
        torch.OutOfMemoryError: no memory for the INT8 copies or the pooled keys; masks and counter are as before.
    """
    _, heads, seqlen_q, head_dim = q.shape
    seqlen_k, device = k.shape[2], q.device
    arch = architecture(device)
    hopper = takes_hopper(device, head_dim, q.dtype, int8) if hopper is None and config is None else hopper
    config = config or launch_config(arch, head_dim, q.dtype, int8)
    # What several kernels take, by their names of it.
    common = {"n_heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "TILE": TILE, "D": head_dim,
              "D_PADDED": _padded(head_dim), "MASS": mass,
              "PRECISION": "ieee" if arch.startswith("gfx") or q.dtype != torch.float32 else "tf32x3"}
    kind = (device, q.dtype, *map(_layout, (q, k, v, computed)), lse is None, must_keep is None, recording, mass, int8,
            pool_skipped, hopper, config)
    with torch.cuda.device(device) if device.type == "cuda" else _FREE, \
            _FREE if kind in _compiled else _alone_at_first(kind):
        if int8:
            threshold -= INT8_GUARD
        threshold = 2.0 ** threshold if mass else threshold
        masks = workspace.mask_table(tuple([(m.words.data_ptr() + 4 * m.words.stride(0) * e, int(b))
                                            for (m, e), b in zip(entries, backwards, strict=True)]), device)
        copies, pooled, lists = None, _Pooled(), None
        if int8:
            copies = _int8_copies(q, k, v, config.pv_fp16)
        if pool_skipped:
            pooled = _attend_pooled(q, k, v, out, masks, copies, sm_scale, threshold, common, workspace)
        try:
            lists = _tile_lists(masks, recording, must_keep, computed, heads, seqlen_q, seqlen_k, workspace)
            order = lists.order(workspace, seqlen_q)
            blocks = hopper_descriptors((q, k, v), [_told_strides(x) for x in (q, k, v)]) if hopper else None
            if blocks is not None:
                attend_hopper(blocks, out, lse, masks, *lists, order, *pooled, sm_scale * _LOG2E, threshold, mass,
                              recording, seqlen_q, seqlen_k)
            else:
                _attend(q, k, v, out, lse, masks, lists, order, copies, pooled, sm_scale, threshold, common, config)
        except Exception:
            if computed is not None and lists is not None:
                with suppress(RuntimeError):  # a device that has failed refuses this too
                    computed.view(-1)[:1].sub_(lists.counts_ptr.sum())
            if recording:
                for m, _ in entries:
                    m.reset()
            raise


_compiling = threading.Lock()
_compiled: set[Hashable] = set()
_FREE = nullcontext()
"""Kinds of calls whose kernels are loaded in this process."""


@contextmanager
def _alone_at_first(kind: Hashable) -> Iterator[None]:
    """Holds other threads off while a call that is the first of its kind compiles and loads its kernels.

    Threads that ask for one kernel at once each compile it, and on one GPU each load it; in turn, the thread of another
    GPU finds it in the cache on disk. The interpreter has one position in the grid for a whole process: there every
    call is alone.
    """
    with _compiling:
        yield
        if isinstance(attention_kernel, JITFunction):
            _compiled.add(kind)


def _layout(x: Tensor | None) -> Hashable:
    """All of a tensor that Triton compiles for."""
    return None if x is None else (x.shape, x.stride(), x.data_ptr() % 16)


def _tile_lists(masks: Tensor, recording: bool, must_keep: MustKeep | None, computed: Tensor | None, heads: int,
                seqlen_q: int, seqlen_k: int, workspace: Workspace) -> _TileLists:
    """Mask bits to tile lists."""
    k_tiles, n_lists = tiles(seqlen_k), masks.shape[0] * heads * tiles(seqlen_q)
    lists = workspace.buffer("lists", n_lists * -(-k_tiles // 16) * 16, torch.int16, masks.device)
    counts = workspace.buffer("counts", n_lists, torch.int32, masks.device)[:n_lists]
    must = None
    if must_keep is not None and recording:
        must = workspace.must_words(must_keep, seqlen_q, seqlen_k, masks.device)
    tile_list_kernel[(n_lists,)](
        masks_ptr=masks, must_ptr=must, lists_ptr=lists, counts_ptr=counts, computed_ptr=computed, n_heads=heads,
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, n_counters=0 if computed is None else computed.numel(), TILE=TILE,
        REWRITE=recording, HAS_MUST=must is not None, COUNTS=computed is not None,
        CHUNK=8 if k_tiles <= 8 * WORD_BITS else 32, num_warps=4)
    return _TileLists(lists, counts)


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, masks: Tensor, lists: _TileLists,
            order: Tensor, copies: _Int8 | None, pooled: _Pooled, sm_scale: float, threshold: float, common: dict,
            config: LaunchConfig) -> None:
    """Attention over the tile lists."""
    q_scale = k_scale = v_scale = None
    if copies is not None:
        q, k, v, q_scale, k_scale, v_scale, _ = copies
    strides = _strides(q=q, k=k, v=v, o=out)
    descriptors = [_descriptor(x, config.BLOCK_N) for x in (k, v)] if config.tma else [None]
    if tma := None not in descriptors:
        k, v = descriptors
    attention_kernel[(lists.counts_ptr.numel() * (TILE // config.BLOCK_M),)](
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, q_scale_ptr=q_scale, k_scale_ptr=k_scale,
        v_scale_ptr=v_scale, masks_ptr=masks, lists_ptr=lists.lists_ptr, counts_ptr=lists.counts_ptr, order_ptr=order,
        row_threshold_ptr=pooled.row_threshold_ptr, pooled_lse_ptr=pooled.pooled_lse_ptr, **strides,
        qk_scale=sm_scale * _LOG2E, threshold=threshold, **common,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, RAGGED=common["seqlen_k"] % TILE != 0,
        RECORD_IN_REGISTERS=config.record_in_registers, TMA=tma, INT8=copies is not None,
        PV_FP16=v_scale is not None, HAS_LSE=lse is not None, POOLED=pooled.row_threshold_ptr is not None,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages)


def _int8_copies(q: Tensor, k: Tensor, v: Tensor, v_fp16: bool) -> _Int8:
    """INT8 copies of q and k, with `v_fp16` a float16 copy of v; see `quantize_kernel`."""
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    q_tiles, k_tiles = tiles(seqlen_q), tiles(seqlen_k)
    n_chunks = -(-max(seqlen_q, seqlen_k) // CHUNK)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    q8, k8 = empty(torch.int8, seqlen_q, head_dim), empty(torch.int8, seqlen_k, head_dim)
    v16 = empty(torch.float16, seqlen_k, head_dim) if v_fp16 else None
    q_scale, k_scale = empty(torch.float32, seqlen_q), empty(torch.float32, k_tiles)
    v_scale = empty(torch.float32, k_tiles) if v_fp16 else None
    sums = empty(torch.float32, n_chunks, 3, head_dim)
    common = {"n_heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "D": head_dim,
              "D_PADDED": _padded(head_dim), "num_warps": 8}
    channel_sum_kernel[(batch * heads * n_chunks,)](
        q_ptr=q, k_ptr=k, sums_ptr=sums, **_strides(q=q, k=k), **common, n_chunks=n_chunks, CHUNK=CHUNK,
        Q_CHUNK=Q_CHUNK, BLOCK=64)
    mean, balance = empty(torch.float32, 1, head_dim), empty(torch.float32, 1, head_dim)
    balance_kernel[(batch * heads,)](sums_ptr=sums, mean_ptr=mean, balance_ptr=balance, seqlen_k=seqlen_k,
                                     n_chunks=n_chunks, D=head_dim, D_PADDED=_padded(head_dim), num_warps=4)
    quantize_kernel[(batch * heads * max(q_tiles, k_tiles),)](
        q_ptr=q, k_ptr=k, v_ptr=v, mean_ptr=mean, balance_ptr=balance, q8_ptr=q8, k8_ptr=k8, v16_ptr=v16,
        q_scale_ptr=q_scale, k_scale_ptr=k_scale, v_scale_ptr=v_scale, **_strides(q=q, k=k, v=v), **common,
        q_tiles=q_tiles, k_tiles=k_tiles, TILE=TILE, V_FP16=v_fp16)
    return _Int8(q8, k8, v16 if v_fp16 else v, q_scale, k_scale, v_scale, mean)


def _attend_pooled(q: Tensor, k: Tensor, v: Tensor, out: Tensor, masks: Tensor, copies: _Int8 | None, sm_scale: float,
                   threshold: float, common: dict, workspace: Workspace) -> _Pooled:
    """Attention over the pooled keys of skipped tiles, and the rows' thresholds."""
    batch, heads, seqlen_k, head_dim = k.shape
    seqlen_q, k_tiles = q.shape[2], tiles(seqlen_k)
    keys, values = (torch.empty(batch, heads, k_tiles, head_dim, dtype=k.dtype, device=k.device) for _ in range(2))
    chunk_tiles = -(-k_tiles // POOL_CHUNKS)
    n_chunks = -(-k_tiles // chunk_tiles)
    # At 64 keys gfx11 has no registers left.
    block_n = 64 if k.itemsize == 2 and not architecture(k.device).startswith("gfx11") else 32
    partial = torch.empty(batch, heads, n_chunks, 2, head_dim, head_dim, dtype=torch.float32, device=k.device)
    pool_kernel[(batch * heads * n_chunks * 2,)](
        k_ptr=k, v_ptr=v, keys_ptr=keys, values_ptr=values, moments_ptr=partial, **_strides(k=k, v=v), n_heads=heads,
        seqlen=seqlen_k, n_tiles=k_tiles, n_chunks=n_chunks, chunk_tiles=chunk_tiles, TILE=TILE,
        BLOCK_N=block_n, D=head_dim, D_PADDED=_padded(head_dim), PRECISION=common["PRECISION"], num_warps=8,
        num_stages=1)
    moments = partial.sum(2)
    # Divided by its largest element, a covariance fits into float16 whatever the range of k and v.
    largest = torch.linalg.vector_norm(moments, math.inf, (-1, -2)).clamp_min_(1e-20)
    moments = moments.div_(largest[..., None, None]).to(k.dtype)
    if copies is not None:
        keys.sub_(copies.key_mean)
    row_threshold, pooled_lse = (workspace.buffer(name, batch * heads * seqlen_q, torch.float32, q.device)
                                 for name in ("row threshold", "pooled lse"))
    block_m, num_warps = (128, 8) if q.itemsize == 2 else (32, 4)
    pooled_attention_kernel[(batch * heads * tiles(seqlen_q) * (TILE // block_m),)](
        q_ptr=q, out_ptr=out, masks_ptr=masks, keys_ptr=keys, values_ptr=values, moments_ptr=moments,
        moment_scale_ptr=largest.div_(seqlen_k), row_threshold_ptr=row_threshold, pooled_lse_ptr=pooled_lse,
        **_strides(q=q, o=out), sm_scale=sm_scale, threshold=threshold, **common, BLOCK_M=block_m, LOST_MIN=LOST_MIN,
        RAISED_MAX=RAISED_MAX, num_warps=num_warps, num_stages=1)
    return _Pooled(row_threshold, pooled_lse)


_STRIDE_NAMES = {x: [f"stride_{x}{axis}" for axis in "bhn"] for x in "qkvo"}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Of q, k, v and the output o [B, H, N, D], by the kernels' names of them: stride_qb, stride_qh, stride_qn, …"""
    return {name: stride for x, tensor in tensors.items()
            for name, stride in zip(_STRIDE_NAMES[x], tensor.stride(), strict=False)}


def _padded(head_dim: int) -> int:
    """The next power of two: Triton's blocks have no other sizes."""
    return 64 if head_dim == 64 else 128


@lru_cache(maxsize=256)
def _descriptor_strides(shape: tuple[int, ...], strides: tuple[int, ...], misaligned: int,
                        itemsize: int) -> list[int] | None:
    """What TMA is told of a tensor [B, H, N, D], or None where it cannot load it: it wants addresses (`misaligned`: by
    how many bytes) and strides of 16 bytes, no broadcast, and a head_dim that is one block wide."""
    # The stride of a dimension of one element is arbitrary; TMA wants it aligned all the same.
    told = [16 if n == 1 else stride for n, stride in zip(shape[:3], strides[:3], strict=True)]
    if shape[3] not in (64, 128) or misaligned or any(s <= 0 or s * itemsize % 16 for s in told):
        return None
    return [*told, 1]


def _told_strides(x: Tensor) -> list[int] | None:
    return _descriptor_strides(tuple(x.shape), x.stride(), x.data_ptr() % 16, x.itemsize)


def _descriptor(x: Tensor, block_n: int) -> TensorDescriptor | None:
    """x [B, H, N, D] in blocks of block_n tokens, or None, see `_descriptor_strides`."""
    strides = _told_strides(x)
    return strides and TensorDescriptor(x, list(x.shape), strides, [1, 1, block_n, x.shape[3]])
