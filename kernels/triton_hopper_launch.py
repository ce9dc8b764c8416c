"""The host side of the attention kernel for Hopper: which calls it takes, and its launches."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .launch_table import architecture, serves_hopper
from .mask import TILE, WORD_BITS, tiles
from .system import setting
from .triton_probe import hopper_verdict

log = logging.getLogger("LiteAttention")

HOPPER_ENV = "LITEATTENTION_HOPPER"
TRITON = "3.6"
"""The version that the kernel is made for: Gluon calls itself experimental and changes between versions."""
STAGES = 2
"""Tiles of keys, and of values, in shared memory."""
_BLOCKS = {"q_desc": TILE // 2, "k_desc": TILE, "v_desc": TILE}
"""Rows of the blocks in which q, k and v are loaded."""


def takes_hopper(device: torch.device, head_dim: int, dtype: torch.dtype, int8: bool) -> bool:
    """Whether the environment variable LITEATTENTION_HOPPER asks for the kernel, this kind of call is one of its own,
    and it has passed its self-test here."""
    return setting(HOPPER_ENV) == "1" and hopper_passes(device, head_dim, dtype, int8)


def hopper_passes(device: torch.device, head_dim: int, dtype: torch.dtype, int8: bool = False) -> bool:
    """The same without the request."""
    return serves_hopper(architecture(device), head_dim, dtype, int8) and _passes(device)


@lru_cache(maxsize=None)
def _passes(device: torch.device) -> bool:
    if triton.__version__.split(".")[:2] == TRITON.split("."):
        problem = hopper_verdict(device).reason
    else:
        problem = f"it is made for Triton {TRITON}, and this is {triton.__version__}"
    if problem:
        log.warning("LiteAttention: the kernel for Hopper (%s) cannot be used, the usual one is: %s", HOPPER_ENV,
                    problem)
    return not problem


def hopper_descriptors(tensors: tuple[Tensor, ...], strides: list[list[int] | None]) -> dict | None:
    """Of q, k and v [B, H, N, D] with the strides that TMA is told, or None where it cannot load one of them."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if None in strides:
        return None
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return {name: TensorDescriptor(x, list(x.shape), told, [1, 1, rows, x.shape[3]], layout)
            for x, told, (name, rows) in zip(tensors, strides, _BLOCKS.items(), strict=True)}


def attend_hopper(descriptors: dict, out: Tensor, lse: Tensor | None, masks: Tensor, lists: Tensor, counts: Tensor,
                  order: Tensor, row_threshold: Tensor | None, pooled_lse: Tensor | None, qk_scale: float,
                  threshold: float, mass: bool, recording: bool, seqlen_q: int,
                  seqlen_k: int) -> None:
    """Attention over the tile lists and, while recording, a second launch for the masks. Arguments as the kernels take
    them, descriptors: from `hopper_descriptors`."""
    from .triton_hopper import hopper_attention_kernel, pack_kernel

    sizes = {"n_heads": out.shape[1], "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "TILE": TILE}
    k_tiles, n_lists = tiles(seqlen_k), counts.numel()
    flags = None
    if recording:
        flags = torch.zeros(n_lists, -(-k_tiles // 16) * 16, dtype=torch.int8, device=counts.device)
    hopper_attention_kernel[(n_lists,)](
        **descriptors, out_ptr=out, lse_ptr=lse, lists_ptr=lists, counts_ptr=counts, order_ptr=order, flags_ptr=flags,
        row_threshold_ptr=row_threshold, pooled_lse_ptr=pooled_lse, stride_ob=out.stride(0), stride_oh=out.stride(1),
        stride_on=out.stride(2), qk_scale=qk_scale, threshold=threshold, **sizes, STAGES=STAGES,
        RAGGED=seqlen_k % TILE != 0, RECORD=recording, MASS=mass, HAS_LSE=lse is not None,
        POOLED=row_threshold is not None, num_warps=4)
    if recording:
        pack_kernel[(n_lists,)](flags_ptr=flags, masks_ptr=masks, **sizes,
                                CHUNK=8 if k_tiles <= 8 * WORD_BITS else 32, num_warps=4)
