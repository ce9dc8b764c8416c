"""Which calls compute q·k in INT8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch_table import architecture, is_geforce

PRECISIONS = ("auto", "full", "int8")
AUTO_INT8_MIN_TOKENS = 12288
"""Below this the INT8 copies of q, k, v eat much of what the faster products save: at 8k tokens a tenth of a dense call
and a third of one that skips 77 % (by counts of operations for an RTX 4090; not yet measured)."""

INT8_GUARD = 0.5
"""log2. INT8 scores decide with a threshold lower by this much. An error of x in a score moves a skip test by up to
2 x; x stays under 0.15 for q and k of unit variance at head_dim 128 (tests/kernels/test_int8.py)."""


@dataclass(frozen=True)
class PrecisionChoice:
    """`name`: "full" or "int8". `reason`: why INT8, asked for by name, is not taken; else ""."""

    name: str
    reason: str = ""


def precision_choice(device: torch.device, head_dim: int, dtype: torch.dtype, seqlen: int, requested: str = "auto",
                     backend: str = "triton") -> PrecisionChoice:
    """How a call of these shapes computes q·k.

    Args:
        dtype: of q, k, v.
        seqlen: keys of the call.
        requested: "full": in the input dtype. "int8": with INT8 products wherever this GPU and dtype have them.
            "auto": INT8 on GeForce architectures (sm_86, sm_89, sm_120) from `AUTO_INT8_MIN_TOKENS` keys, where their
            tensor cores are four times as fast in INT8 and twice in float16 accumulation; full elsewhere.
        backend: the backend of the call; "torch" always computes in full precision.

    Raises:
        ValueError: `requested` is none of these.
    """
    return precision_on(architecture(device), dtype, seqlen, requested, backend)


def precision_on(arch: str, dtype: torch.dtype, seqlen: int, requested: str,
                 backend: str = "triton") -> PrecisionChoice:
    """`precision_choice` for an architecture as `launch_table` names it."""
    if requested not in PRECISIONS:
        raise ValueError(f"precision is {requested!r}; allowed: {', '.join(PRECISIONS)}")
    if requested == "full":
        return PrecisionChoice("full")
    reason = ""
    if backend != "triton":
        reason = "INT8 needs the Triton backend; the torch backend computes in full precision"
    elif dtype == torch.float32:
        reason = "q, k, v are float32; INT8 takes the place of float16 and bfloat16 only"
    elif arch in ("sm_100", "sm_103"):
        reason = f"{arch} is slower in INT8 than in {str(dtype).removeprefix('torch.')}"
    elif arch.startswith("gfx"):
        reason = f"INT8 is made for NVIDIA GPUs; {arch} computes in full precision"
    if requested == "auto":
        wanted = not reason and is_geforce(arch) and seqlen >= AUTO_INT8_MIN_TOKENS
        return PrecisionChoice("int8" if wanted else "full")
    return PrecisionChoice("full", reason) if reason else PrecisionChoice("int8")
