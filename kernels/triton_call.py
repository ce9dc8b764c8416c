"""The host side of a Triton call: which kernels are launched, with what."""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import CallKind, LaunchConfig, architecture, launch_config
from .mask import MAX_KEY_TILES, TILE, MustKeep, mask_shape, tiles
from .precision import INT8_GUARD
from .triton_attention import attention_kernel
from .triton_expand import expand_kernel
from .triton_quantize import MEAN_CHUNK, channel_sum_kernel, quantize_kernel
from .workspace import Workspace

_LOG2E = 1.0 / math.log(2.0)

_REUSES_COMPILED = triton.__version__.startswith("3.6.")
"""Versions whose compiled kernels are known to take their arguments as `_launch` passes them."""

COST_CLASSES = 16
COST_ORDER_MAX_TOKENS = 16384
"""Below this the last rows to start leave most of the GPU idle unless the longest start first; above it there are rows
enough, and the order of the heads, which share K and V in the cache, is worth more."""


def triton_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rows: list | None,
                     backwards: list[bool] | None, threshold: float, recording: bool, must_keep: MustKeep | None,
                     sm_scale: float, workspace: Workspace, computed: Tensor | None, *,
                     mass: bool = False, int8: bool = False, skip_now: bool = False,
                     config: LaunchConfig | None = None) -> None:
    """`lite_attention` after its checks: one launch without a mask, two with one, two more for INT8; no host
    synchronisation. INT8 allocates its copies of q, k, v per call: kept between calls they would hold gigabytes that
    the rest of the model needs.

    While recording, a launch that fails leaves the masks of `rows` reset: the expansion has already emptied them.

    Raises:
        ValueError: more keys than tile numbers.
        torch.OutOfMemoryError: no memory for the INT8 copies; nothing was written.
    """
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    _, _, q_tiles, row_words = mask_shape(batch, heads, seqlen_q, seqlen_k)
    k_tiles = tiles(seqlen_k)
    if k_tiles > MAX_KEY_TILES:
        raise ValueError(f"seqlen_k is {seqlen_k}; at most {MAX_KEY_TILES * TILE} keys have a tile number")
    device = q.device
    arch = architecture(device)
    config = config or launch_config(CallKind(arch, head_dim, q.dtype, recording, int8))
    n_rows = batch * heads * q_tiles
    list_stride = -(-k_tiles // 16) * 16
    ragged = seqlen_k % TILE != 0
    # The kernel does not know which tiles must stay: with such ranges every tile is computed.
    branch = recording and skip_now and must_keep is None and config.branch and not mass
    if int8:
        threshold -= INT8_GUARD
    tensor_cores = "ieee" if arch.startswith("gfx") or q.dtype != torch.float32 else "tf32x3"
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        q_scale = k_scale = v_scale = out
        if int8:
            q, k, v, q_scale, k_scale, v_scale = _int8_copies(q, k, v, config.pv_fp16, workspace)
        table = lists = counts = order = out
        turn = cost_classes = 0
        counted = False
        try:
            if rows is not None:
                table = workspace.row_table(
                    tuple((m.words[r].data_ptr(), int(b)) for (m, r), b in zip(rows, backwards, strict=True)), device)
                lists = workspace.buffer("list", n_rows * list_stride, torch.int16, device)
                counts = order = workspace.buffer("count", n_rows, torch.int32, device)
                if seqlen_q < COST_ORDER_MAX_TOKENS:
                    cost_classes = COST_CLASSES
                    order = workspace.cost_order((2 + n_rows) * COST_CLASSES, device)
                    turn = workspace.cost_order_turn[device]
                must = table if must_keep is None or not recording else workspace.must_words(
                    must_keep, seqlen_q, seqlen_k, device)
                _launch(workspace, expand_kernel, n_rows,
                        (table, must, lists, counts, order, table if computed is None else computed), (),
                        (heads, n_rows, q_tiles, k_tiles, row_words, list_stride,
                         0 if computed is None else computed.numel(), turn),
                        (must is not table, ragged, recording, computed is not None, cost_classes,
                         8 if row_words <= 8 else 32), 4, 2)
                counted = computed is not None
                if cost_classes:
                    workspace.cost_order_turn[device] = 1 - turn
            elif computed is not None:
                computed.view(-1)[:1].add_(n_rows * k_tiles)
            strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
            tma = config.tma and _has_descriptors(k) and _has_descriptors(v)
            if tma:
                k, v = _descriptor(k, config.BLOCK_N), _descriptor(v, config.BLOCK_N)
            d_main = 64 if head_dim == 96 else head_dim
            _launch(workspace, attention_kernel, n_rows * (TILE // config.BLOCK_M),
                    (q, k, v, out, out if lse is None else lse, q_scale, k_scale, v_scale, table, lists, counts, order),
                    strides,
                    (sm_scale * _LOG2E, 2.0 ** threshold if mass else threshold, heads, n_rows, seqlen_q,
                     seqlen_k, q_tiles, k_tiles, row_words, list_stride, turn),
                    (TILE, config.BLOCK_M, config.BLOCK_N, d_main, head_dim - d_main, rows is None, ragged,
                     cost_classes, config.record if recording else 0, recording and mass, branch, tma, int8,
                     int8 and config.pv_fp16, lse is not None, tensor_cores, config.num_stages), config.num_warps, config.num_stages)
        except Exception:
            if counted:
                with suppress(RuntimeError):  # a device that has failed refuses this too
                    computed.view(-1)[:1].sub_(counts[:n_rows].sum())
            if recording:
                for m, _ in rows:
                    m.reset()
            raise


def _launch(workspace: Workspace, kernel: JITFunction, programs: int, pointers: tuple[Tensor | TensorDescriptor, ...],
            strides: tuple[int, ...], scalars: tuple[int | float, ...], constants: tuple, num_warps: int,
            num_stages: int) -> None:
    """Launch a kernel with its parameters in order. Calls that Triton compiles alike go around its search for the
    compiled kernel, which costs 20 us each.

    Alike: types and alignment of the pointers, strides and constants agree; the scalars are not specialised.
    """
    alike = (kernel.__name__, pointers[0].device, constants, strides, num_warps, num_stages,
             *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else (x.base.dtype, *x.block_shape)
               for x in pointers])
    compiled = workspace.compiled.get(alike)
    if compiled is not None:
        compiled[(programs, 1, 1)](*pointers, *strides, *scalars, *constants)
        return
    compiled = kernel[(programs,)](*pointers, *strides, *scalars, *constants, num_warps=num_warps,
                                   num_stages=num_stages)
    if _REUSES_COMPILED and isinstance(compiled, CompiledKernel):
        workspace.compiled[alike] = compiled


def _int8_copies(q: Tensor, k: Tensor, v: Tensor, v_fp16: bool, workspace: Workspace) -> tuple[Tensor, ...]:
    """q8, k8, v (a scaled float16 copy with `v_fp16`), and their scales; see `quantize_kernel`."""
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
    _launch(workspace, channel_sum_kernel, batch * heads * n_chunks, (k, sums), k.stride()[:3],
            (heads, seqlen_k, n_chunks), (MEAN_CHUNK, 64, head_dim, d_padded), 8, 2)
    _launch(workspace, quantize_kernel, batch * heads * max(q_tiles, k_tiles),
            (q, k, v, sums, q8, k8, v16, q_scale, k_scale, v_scale),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            (heads, seqlen_q, seqlen_k, q_tiles, k_tiles, n_chunks), (TILE, head_dim, d_padded, v_fp16), 8, 2)
    return q8, k8, v16, q_scale, k_scale, v_scale


def _has_descriptors(x: Tensor) -> bool:
    """Whether TMA can load x [B, H, N, D]: 16-byte alignment, no broadcast, and a head_dim that is one block wide."""
    if x.shape[-1] not in (64, 128) or x.data_ptr() % 16:
        return False
    return all(n == 1 or (stride > 0 and stride * x.itemsize % 16 == 0)
               for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def _descriptor(x: Tensor, block_n: int) -> TensorDescriptor:
    # The stride of a dimension of one element is arbitrary; TMA wants it aligned all the same.
    strides = [16 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    descriptor = object.__new__(TensorDescriptor)  # its own checks are those of `_has_descriptors`, at 7 us
    descriptor.base, descriptor.shape, descriptor.strides = x, list(x.shape), [*strides, 1]
    descriptor.block_shape, descriptor.padding = [1, 1, block_n, x.shape[-1]], "zero"
    return descriptor
