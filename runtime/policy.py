"""Which calls skip-mask attention takes: pure functions that give the reason for leaving one, or None."""

from __future__ import annotations

from typing import NamedTuple

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
NO_ROOM = "the skip masks would not fit"
KERNEL_FAILED = "the kernel failed in this run"
NO_BACKEND = "no fast backend on this device"
DENSE_FASTER = "dense attention is faster here"
NOT_IN_PROFILE = "layer not in the profile"
PROFILE_SIZE = "profile made for another size of the model"

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


class VideoTokens(NamedTuple):
    """What is known about the video's tokens in the self-attentions of a forward pass.

    Attributes:
        count: tokens of the video.
        front, behind: how many other tokens come before and after them. One of the two is enough, the rest of a
            sequence is at the other end; None for both means that it is not known.
        width: heads x head_dim of the attentions over the video, where those over other tokens have another one.
    """

    count: int
    front: int | None = None
    behind: int | None = None
    width: int | None = None

    @classmethod
    def of(cls, tokens: int | VideoTokens) -> VideoTokens:
        """`tokens`, or a bare count with nothing known beside it."""
        return tokens if isinstance(tokens, cls) else cls(tokens)

    def ends(self, seqlen: int) -> tuple[int, int]:
        """Tokens to keep at the start and at the end of a sequence: at least all that are not the video's."""
        extra = max(seqlen - self.count, 0)
        front = self.front if self.front is not None else extra - self.behind if self.behind is not None else -1
        return (front, extra - front) if 0 <= front <= extra else (extra, extra)


def token_reason(seqlen: int, latent_tokens: int | VideoTokens | None, width: int | None = None) -> str | None:
    """Why a self-attention over `seqlen` tokens, `width` = heads x head_dim, may not be one over the video's tokens, or
    None if it is."""
    if latent_tokens is None:
        return NO_LAYOUT
    video = VideoTokens.of(latent_tokens)
    if seqlen < video.count or (video.width is not None and width is not None and width != video.width):
        return NOT_VIDEO
    return MOSTLY_EXTRA if seqlen - video.count > video.count else None


def must_keep_tokens(seqlen: int, latent_tokens: int | VideoTokens) -> MustKeep | None:
    """Ranges to protect when the sequence holds more than the video: text, references, registers.

    Models put them first (HunyuanVideo, Flux) or last (Mochi); where it is not known which, both ends stay.
    """
    front, behind = VideoTokens.of(latent_tokens).ends(seqlen)
    ranges = tuple((start, stop) for start, stop in ((0, front), (seqlen - behind, seqlen)) if start < stop)
    return MustKeep(keys=ranges, queries=ranges) if ranges else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the device's (or the CPU allocator's) out-of-memory error."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
