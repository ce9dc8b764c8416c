"""How the attention kernel is launched on each architecture: one static table, no autotuning in a render."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .mask import TILE


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of one (architecture, head_dim, dtype).

    Attributes:
        BLOCK_M, BLOCK_N: compute tile; both divide the 128 x 128 mask tile, whose meaning they do not change.
        record: how keep decisions reach the mask. 1 reduces the rows and issues one atomic OR per compute tile,
            3 collects bits per row in registers and flushes them when the mask word changes.
    """

    BLOCK_M: int = 128
    BLOCK_N: int = 64
    num_warps: int = 8
    num_stages: int = 2
    record: int = 3

    def __post_init__(self) -> None:
        if TILE % self.BLOCK_M or TILE % self.BLOCK_N or self.record not in (1, 3):
            raise ValueError(f"{self}: BLOCK_M and BLOCK_N divide {TILE}, record is 1 or 3")


# Evidence: ahead-of-time compilation for each target with Triton 3.6, `python benchmarks/static.py`
# (registers, spills, shared memory, async copies). Speeds are not yet measured.
_MMA_SYNC = LaunchConfig()
_FLOAT32 = LaunchConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4)  # tf32x3 holds six operands: larger tiles spill kilobytes
_CDNA = LaunchConfig(num_warps=4, num_stages=1, record=1)
_RDNA = LaunchConfig(BLOCK_N=32, num_stages=1, record=1)
_HOPPER = LaunchConfig(BLOCK_N=128, record=1)
_TABLE: dict[tuple[str, int, bool], LaunchConfig] = {
    # (architecture, head_dim, float32)
    ("sm_90", 64, False): replace(_HOPPER, BLOCK_N=64),
    ("sm_90", 96, False): _HOPPER,
    ("sm_90", 128, False): _HOPPER,
}


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


def launch_config(arch: str, head_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """The configuration for one architecture ("sm_89"), head_dim and input dtype."""
    float32 = dtype == torch.float32
    half = _CDNA if arch.startswith("gfx9") else _RDNA if arch.startswith("gfx") else _MMA_SYNC
    default = _FLOAT32 if float32 else half
    return _TABLE.get((arch, head_dim, float32), default)
