"""How the kernels are launched on each architecture: one static table, no autotuning in a render."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch

from .cache import user_cache_dir
from .mask import TILE

LAUNCH_ENV = "LITEATTENTION_LAUNCH"


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of one kind of call.

    Attributes:
        BLOCK_M, BLOCK_N: compute tile; both divide the 128 x 128 mask tile, whose meaning they do not change.
        record: how keep decisions reach the mask. 1 reduces the rows and issues one atomic OR per compute tile,
            3 collects bits per row in registers and flushes them when the mask word changes.
        tma: load K and V through tensor descriptors where their addresses and strides allow it.
        pv_fp16: in INT8 calls, accumulate P·V of one compute tile in float16.
        branch: while recording, leave exp and P·V of a compute tile that every row drops out of this very call.
    """

    BLOCK_M: int = 128
    BLOCK_N: int = 64
    num_warps: int = 8
    num_stages: int = 2
    record: int = 3
    tma: bool = False
    pv_fp16: bool = False
    branch: bool = False

    def __post_init__(self) -> None:
        if TILE % self.BLOCK_M or TILE % self.BLOCK_N or self.record not in (1, 3):
            raise ValueError(f"{self}: BLOCK_M and BLOCK_N divide {TILE}, record is 1 or 3")
        if self.pv_fp16 and self.BLOCK_N > 64:
            raise ValueError(f"{self}: pv_fp16 sums at most 64 keys, BLOCK_N is at most 64")


@dataclass(frozen=True)
class CallKind:
    """What a configuration is chosen by. `arch`: "sm_89", "gfx942", "cpu"; dtype: that of q, k, v."""

    arch: str
    head_dim: int
    dtype: torch.dtype
    recording: bool = False
    int8: bool = False

    @property
    def key(self) -> str:
        """"sm_89 d128 bfloat16 int8 record": names the kind in the file of tuned configurations."""
        return " ".join([self.arch, f"d{self.head_dim}", str(self.dtype).removeprefix("torch."),
                         "int8" if self.int8 else "full", "record" if self.recording else "read"])


# Evidence: ahead-of-time compilation for each target with Triton 3.6 (`python benchmarks/static.py`: registers,
# spills, shared memory, asynchronous copies, serialised wgmma). Speeds are not yet measured.
_FLOAT32 = LaunchConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4)  # tf32x3 holds six operands: larger tiles spill kilobytes
_MMA_SYNC = LaunchConfig(branch=True)
_HOPPER = LaunchConfig(BLOCK_N=128, record=1, tma=True, branch=True)
_BLACKWELL = LaunchConfig(BLOCK_N=128, tma=True)  # branch: Triton 3.6 cannot lay out the scores for it
_CDNA = LaunchConfig(num_warps=4, num_stages=1, record=1)
_RDNA = LaunchConfig(BLOCK_N=32, num_stages=1, record=1)
_RDNA3 = replace(_RDNA, BLOCK_M=64)  # at 128 rows gfx11 spills a hundred registers

_GEFORCE = ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
"""Architectures of GeForce cards, where float32 accumulation halves the tensor rate (professional cards share them)."""

_BREAK_EVEN = {"sm_80": 0.80, "sm_90": 0.75, "sm_100": 0.60, "sm_103": 0.60, "cpu": 1.0}
_BREAK_EVEN_DEFAULT = 0.90


def table_config(kind: CallKind) -> LaunchConfig:
    """The built-in configuration for one kind of call."""
    if kind.dtype == torch.float32:
        return _FLOAT32
    if kind.arch.startswith("gfx9"):
        return _CDNA
    if kind.arch.startswith("gfx"):
        return _RDNA3 if kind.arch.startswith("gfx11") else _RDNA
    if kind.arch == "sm_90":
        return _HOPPER if kind.head_dim != 64 else replace(_HOPPER, BLOCK_N=64)
    if kind.arch in ("sm_100", "sm_103"):
        return _BLACKWELL
    return replace(_MMA_SYNC, pv_fp16=kind.int8 and kind.arch in (*_GEFORCE, "cpu"))


def launch_config(kind: CallKind) -> LaunchConfig:
    """The configuration for one kind of call: the table's, or what the `tune` command measured on this machine to be
    faster, changed where the environment variable LITEATTENTION_LAUNCH says so ("BLOCK_N=64,num_stages=3").

    Raises:
        ValueError: LITEATTENTION_LAUNCH names something that is no field or no possible value.
    """
    return _launch_config(kind, os.environ.get(LAUNCH_ENV))


@lru_cache(maxsize=256)
def _launch_config(kind: CallKind, override: str | None) -> LaunchConfig:
    config = _tuned(tuned_path()).get(kind.key) or table_config(kind)
    return replace(config, **_parse(override)) if override else config


def is_geforce(arch: str) -> bool:
    """Whether GeForce cards have this architecture."""
    return arch in _GEFORCE


def break_even_density(device: torch.device, head_dim: int, dtype: torch.dtype) -> float:
    """Share of active tiles (0..1) above which a dense attention of torch is expected to be faster than ours.

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


def tuned_path() -> Path:
    """The file in the user's cache that the `tune` command writes."""
    return user_cache_dir() / "launch.json"


def store_tuned(configs: dict[str, LaunchConfig]) -> Path:
    """Add configurations, by `CallKind.key`, to the user's file; its path."""
    path = tuned_path()
    held = {**_tuned(path), **configs}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps({key: asdict(config) for key, config in held.items()}, indent=1), encoding="utf-8")
    os.replace(partial, path)
    _launch_config.cache_clear()
    return path


def _tuned(path: Path) -> dict[str, LaunchConfig]:
    """The user's tuned configurations; what cannot be read or is no configuration is left to the table."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): LaunchConfig(**values) for key, values in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _parse(text: str) -> dict[str, int | bool]:
    known = {f.name: f.type for f in fields(LaunchConfig)}
    values: dict[str, int | bool] = {}
    for part in text.split(","):
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in known or not value.isdigit():
            raise ValueError(f"environment variable {LAUNCH_ENV} holds {part.strip()!r}; allowed: name=number with the "
                             f"names {', '.join(known)} (0 and 1 for tma, pv_fp16 and branch), joined by commas")
        values[name] = bool(int(value)) if known[name] == "bool" else int(value)
    return values
