"""How the kernels are launched on each architecture: one static table, no autotuning in a render."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .mask import TILE


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of the attention kernel for one kind of call.

    Attributes:
        BLOCK_M, BLOCK_N: compute tile; both divide the 128 x 128 mask tile, whose meaning they do not change.
        record_in_registers: each query row collects its keep decisions in a register, and the program writes them when
            the mask word changes. False: one reduction over the rows and one atomic OR per compute tile.
        tma: load K and V through tensor descriptors where their addresses and strides allow it.
        pv_fp16: in INT8 calls, accumulate P·V of one compute tile in float16.
    """

    BLOCK_M: int = 128
    BLOCK_N: int = 64
    num_warps: int = 8
    num_stages: int = 2
    record_in_registers: bool = True
    tma: bool = False
    pv_fp16: bool = False

    def __post_init__(self) -> None:
        if TILE % self.BLOCK_M or TILE % self.BLOCK_N:
            raise ValueError(f"{self}: BLOCK_M and BLOCK_N divide {TILE}")
        if self.pv_fp16 and self.BLOCK_N > 64:
            raise ValueError(f"{self}: pv_fp16 sums at most 64 keys, BLOCK_N is at most 64")


# Evidence: ahead-of-time compilation for each target with Triton 3.6 (`python benchmarks/static.py`: registers,
# spills, shared memory, asynchronous copies, serialised wgmma). Speeds are not yet measured.
_FLOAT32 = LaunchConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4)  # tf32x3 holds six operands: larger tiles spill kilobytes
_HOPPER = LaunchConfig(BLOCK_N=128, record_in_registers=False, tma=True)  # in registers, wgmma is serialised
_BLACKWELL = LaunchConfig(BLOCK_N=128, tma=True)
_CDNA = LaunchConfig(num_warps=4, num_stages=1, record_in_registers=False)
_RDNA = LaunchConfig(BLOCK_N=32, num_stages=1, record_in_registers=False)
_RDNA3 = replace(_RDNA, BLOCK_M=64)  # at 128 rows gfx11 spills a hundred registers

_GEFORCE = ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
"""Architectures of GeForce cards, where float32 accumulation halves the tensor rate (professional cards share them)."""

_BREAK_EVEN = {"sm_80": 0.80, "sm_90": 0.75, "sm_100": 0.60, "sm_103": 0.60, "cpu": 1.0}
_BREAK_EVEN_DEFAULT = 0.90


@lru_cache(maxsize=None)
def launch_config(arch: str, head_dim: int, dtype: torch.dtype, int8: bool = False) -> LaunchConfig:
    """The configuration for one kind of call. arch: as `architecture` gives it; dtype: that of q, k, v."""
    if dtype == torch.float32:
        return _FLOAT32
    if arch.startswith("gfx9"):
        return _CDNA
    if arch.startswith("gfx"):
        return _RDNA3 if arch.startswith("gfx11") else _RDNA
    if arch == "sm_90":
        return _HOPPER if head_dim != 64 else replace(_HOPPER, BLOCK_N=64)
    if arch in ("sm_100", "sm_103"):
        return _BLACKWELL
    # Before sm_120, the masks of 96 channels padded to 128 leave no registers for the decisions.
    in_registers = int8 or head_dim != 96 or arch in ("sm_120", "sm_121")
    return LaunchConfig(record_in_registers=in_registers, pv_fp16=int8 and (is_geforce(arch) or arch == "cpu"))


def serves_hopper(arch: str, head_dim: int, dtype: torch.dtype, int8: bool) -> bool:
    """Whether the kernel for Hopper (`triton_hopper.py`) can compute calls of this kind."""
    return arch == "sm_90" and head_dim in (64, 128) and dtype.itemsize == 2 and not int8


def is_geforce(arch: str) -> bool:
    """Whether GeForce cards have this architecture."""
    return arch in _GEFORCE


def break_even_density(device: torch.device, head_dim: int, dtype: torch.dtype) -> float:
    """Share of active tiles (0..1) above which a dense attention of torch is expected to be faster.

    From published dense speeds of Triton kernels against cuDNN and FlashAttention; not yet measured with these
    kernels. Where a run can time both sides, what it measures takes the place of this value.
    """
    return _BREAK_EVEN.get(architecture(device), _BREAK_EVEN_DEFAULT)


def architecture(device: torch.device) -> str:
    """"sm_80", "sm_90", … for NVIDIA, "gfx942", … for AMD, "cpu" for Triton's interpreter."""
    if device.type != "cuda":
        return "cpu"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache(maxsize=None)
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
