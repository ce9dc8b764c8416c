"""Which calls skip-mask attention takes: pure functions that give the reason for leaving one, or None."""

from __future__ import annotations

import torch

from ..kernels import MustKeep, unsupported_call
from .call import AttentionCall

CROSS_ATTENTION = "cross-attention"
NOT_VIDEO = "not the video tokens"
NO_LAYER = "the model does not say which layer calls"
NO_ROWS = "batch rows without an identity"
NO_LAYOUT = "token layout unknown"
MOSTLY_EXTRA = "more extra tokens than video tokens"
EXTRA_PASS = "extra guidance pass"
MOVING_WINDOWS = "context windows move between steps"
NO_RUN = "outside a sampling run"
DENSE_BLOCK = "dense_blocks"
OVER_STATE_LIMIT = "over max_state_mb"
NO_MEMORY = "no memory for the skip mask"
KERNEL_FAILED = "the kernel failed in this run"
NO_BACKEND = "no fast backend on this device"
DENSE_FASTER = "dense attention is faster here"

AUTO_MIN_TOKENS = {"cpu": 1024}
AUTO_MIN_TOKENS_DEFAULT = 4096
"""Below this a call has too few tiles to win by skipping. Estimates: the value for GPUs is not yet measured; on a CPU
the break-even depends on ComfyUI's own attention there (benchmarks/cpu.py, demo/run.py)."""


def call_reason(call: AttentionCall, min_tokens: int) -> str | None:
    """Why the call itself cannot be served, from shapes, dtypes and devices."""
    if call.seqlen_q != call.seqlen_k:
        return CROSS_ATTENTION
    problem = unsupported_call(call.q, call.k, call.v, heads=call.packed_heads, attn_mask=call.attn_mask,
                               sm_scale=call.sm_scale)
    if problem is not None:
        return problem.reason
    limit = min_tokens or AUTO_MIN_TOKENS.get(call.q.device.type, AUTO_MIN_TOKENS_DEFAULT)
    return f"fewer than {limit} tokens" if call.seqlen_q < limit else None


def token_reason(seqlen: int, latent_tokens: int | None) -> str | None:
    """Why a self-attention over `seqlen` tokens may not be one over the video's tokens, or None if it is."""
    if latent_tokens is None:
        return NO_LAYOUT
    if seqlen < latent_tokens:
        return NOT_VIDEO
    return MOSTLY_EXTRA if seqlen - latent_tokens > latent_tokens else None


def must_keep_tokens(seqlen: int, latent_tokens: int) -> MustKeep | None:
    """Ranges to protect when the sequence holds more than the video: text, references, registers.

    Models put them first (HunyuanVideo, Flux) or last (Mochi); without knowing which, both ends stay.
    """
    extra = seqlen - latent_tokens
    if extra <= 0:
        return None
    ends = ((0, extra), (seqlen - extra, seqlen))
    return MustKeep(keys=ends, queries=ends)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the device's (or the CPU allocator's) out-of-memory error."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
