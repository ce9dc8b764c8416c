"""Why a call stays dense, as values: what users read, whether it is normal, and what they can do about it.

The tables of docs/troubleshooting.md are made from these values (`python tools/reasons.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..kernels import unsupported_call
from .call import AttentionCall


@dataclass(frozen=True)
class Reason:
    """Attributes:
        text: a few words; calls are counted by it.
        meaning: one sentence for the table of reasons.
        expected: whether it is normal, or the user's own setting.
        hint: what to try where most calls stay dense for this reason, or "".
    """

    text: str
    meaning: str
    expected: bool = False
    hint: str = ""

    def __str__(self) -> str:
        return self.text


CROSS_ATTENTION = Reason(
    "cross-attention", "Queries and keys come from different sequences. Half of the calls in Wan.", expected=True)
QUERY_PIECES = Reason(
    "queries in pieces", "A node or the model asks with a part of the queries at a time. Such calls are sparse once a "
    "pass has shown that the pieces are whole tiles and add up to the sequence in order.",
    hint="set the node that cuts the queries to pieces of a multiple of 128 tokens, or to groups of heads")
NOT_VIDEO = Reason(
    "not the video tokens", "The self-attention of another sequence: text, audio, an image encoder.", expected=True)
WARMUP = Reason("warm-up step", "`warmup_steps`: every tile is computed.", expected=True)
DENSE_END = Reason("dense end step", "`dense_end_steps`: every tile is computed again.", expected=True)
DENSE_BLOCK = Reason("dense_blocks", "The block is in `dense_blocks`.", expected=True)
TOO_SHORT = Reason(
    "fewer than … tokens", "`min_tokens`, or its value for the device: too few tiles to gain.",
    hint="more frames or pixels, or a lower min_tokens to try it anyway")
UNSUPPORTED = Reason(
    "not supported", "The call has a mask, a data type, a head size or a layout that the kernels do not compute; the "
    "text names it.", hint="bypass the node: this model is not supported")
FRAME_BY_FRAME = Reason(
    "frame-by-frame attention", "Wan Animate 2: each frame attends to the whole video and to its own pose.",
    hint="bypass the node: Wan Animate 2 is not supported, its attention goes frame by frame")
CACHED_KEYS = Reason(
    "causal attention with a cache", "Causal Wan: a chunk of frames attends to all chunks before it, and none comes "
    "twice.", hint="bypass the node: causal Wan is not supported, its attention grows from chunk to chunk")
MOSTLY_EXTRA = Reason(
    "more extra tokens than video tokens", "Text or reference tokens outnumber the tokens of the video.",
    hint="fewer or smaller references, or a longer video")
NO_LAYOUT = Reason(
    "token layout unknown", "How many tokens the latent makes is not known.",
    hint="bypass the node: the token layout of this model is not known, it is not supported yet")
NO_LAYER = Reason(
    "the model does not say which layer calls", "The model does not number its blocks, so no mask can be found again.",
    hint="bypass the node: this model does not number its blocks, it is not supported yet")
NO_ROWS = Reason(
    "batch rows without an identity", "The host does not say which prompt a batch row belongs to.",
    hint="report it with the workflow: a node or sampler hides the prompts")
EXTRA_PASS = Reason(
    "extra guidance pass", "A guider evaluates a changed network (skip-layer guidance and its relatives).",
    hint="turn off guidance that changes the network, to gain there")
MOVING_WINDOWS = Reason(
    "context windows move between steps", "Windows cover other frames in every step, so no mask fits twice.",
    hint="choose a context schedule whose windows stay (standard_static or batched)")
SPARSE_ON_TOP = Reason(
    "Model Sparse Attention has the attention", "ComfyUI's own sparse attention was applied after this node.",
    hint="remove Model Sparse Attention or LiteAttention")
DENSE_FASTER = Reason(
    "dense attention is faster here", "The layer keeps too many tiles to gain after the first quarter of the "
    "steps that skip.",
    hint="raise error_budget, or threshold towards 0, to skip more")
NO_BACKEND = Reason(
    "no fast backend on this device", "Triton is missing or does not run here; the note says why.",
    hint="install what the note about the device names")
NO_MEMORY = Reason(
    "no memory for the skip mask", "The mask of the layer could not be allocated.",
    hint="make the video shorter or smaller")
KERNEL_FAILED = Reason(
    "the kernel failed in this run", "An error of the pack; the note has it. The video is correct.",
    hint="report the note about the kernel; the video is correct")
OUT_OF_MEMORY = Reason(
    "out of memory in the sparse kernel", "Raylight: memory ran out on one GPU, which goes on with dense attention, "
    "because an error there would leave the other GPUs waiting.",
    hint="make the video shorter or smaller, or use more GPUs")
RING = Reason(
    "sequence parallelism by ring", "Raylight: with a ring degree above 1 a GPU sees the keys piece by piece, and a "
    "mask for each piece would skip far less.", hint="Raylight's ulysses_degree for all GPUs, and ring_degree 1")
PIPEFUSION = Reason(
    "PipeFusion", "Raylight: a patch of the video attends to keys of the step before.",
    hint="Raylight's ulysses_degree instead of PipeFusion")
CUT_APART = Reason(
    "text and video cut apart", "Raylight: each GPU has a piece of the text and a piece of the video, so that the text "
    "lies in pieces between the video. Or how this model is cut is not known.",
    hint="this model is not supported in Raylight's workers yet")
CAUSAL = Reason(
    "causal attention", "Raylight: a query may not look at the keys after it.",
    hint="causal attention is not supported")

REASONS = (CROSS_ATTENTION, NOT_VIDEO, WARMUP, DENSE_END, DENSE_BLOCK, TOO_SHORT, UNSUPPORTED, QUERY_PIECES,
           FRAME_BY_FRAME, CACHED_KEYS, MOSTLY_EXTRA, NO_LAYOUT, NO_LAYER, NO_ROWS, EXTRA_PASS, MOVING_WINDOWS,
           SPARSE_ON_TOP, DENSE_FASTER, NO_BACKEND, NO_MEMORY, KERNEL_FAILED, OUT_OF_MEMORY, RING, PIPEFUSION,
           CUT_APART, CAUSAL)
"""In the order of the table."""

AUTO_MIN_TOKENS = {"cpu": 1024}
AUTO_MIN_TOKENS_DEFAULT = 4096
"""Below this a call has too few tiles to win by skipping. Estimates: the value for GPUs is not yet measured; on a CPU
the break-even depends on ComfyUI's own attention there (benchmarks/attention.py, demo/run.py)."""


def call_reason(call: AttentionCall, min_tokens: int, piece: bool = False) -> Reason | None:
    """Why a call cannot be sparse, from its shapes, dtypes and devices; or None.

    Args:
        piece: the queries are a piece of the sequence of the keys.
    """
    if call.seqlen_q != call.seqlen_k and not piece:
        return CROSS_ATTENTION
    problem = unsupported_call(call.q, call.k, call.v, heads=call.packed_heads, attn_mask=call.attn_mask,
                               sm_scale=call.sm_scale)
    if problem is not None:
        return replace(UNSUPPORTED, text=problem.reason)
    limit = min_tokens or AUTO_MIN_TOKENS.get(call.q.device.type, AUTO_MIN_TOKENS_DEFAULT)
    return replace(TOO_SHORT, text=f"fewer than {limit} tokens") if call.seqlen_k < limit else None
