"""One forward pass of a model: each attention call is decided, computed and counted here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels import call_tiles
from .call import AttentionCall
from .compute import Plan, SparseAttention, is_out_of_memory
from .config import BlockSet, LiteAttentionConfig
from .counters import Counters
from .masks import LayerKey, MaskTable, Signature
from .reasons import (
    DENSE_BLOCK,
    DENSE_END,
    DENSE_FASTER,
    NO_BACKEND,
    NO_LAYER,
    NO_ROWS,
    WARMUP,
    Reason,
    call_reason,
)
from .schedule import Phase
from .timing import DENSE, SPARSE, AttentionTimes, CallShape
from .video_tokens import VideoTokens, must_keep_tokens, token_reason

_COMPARABLE = (WARMUP, DENSE_END, DENSE_BLOCK, DENSE_FASTER)
"""Dense calls whose time can be compared with that of a sparse call over every tile."""


@dataclass(frozen=True)
class LayerId:
    """How a model names the block that calls: its type, number and, where known, the number of blocks."""

    kind: str
    index: int
    total: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


@dataclass(frozen=True)
class RunParts:
    """What the forward passes of a run share. `step`: from 0. `dense_blocks`: as parsed from the settings."""

    config: LiteAttentionConfig
    dense_blocks: BlockSet
    step: Callable[[], int]
    phase: Callable[[], Phase]
    masks: MaskTable
    sparse: SparseAttention
    counters: Counters
    times: AttentionTimes


class ForwardPass:
    """The context of one forward pass, used by one thread.

    Holds no state across forward passes, so an interrupted one leaves nothing to clean up.

    Args:
        number: of the forward pass in its run.
        model: identity of the network.
        rows: one stable name for each batch entry (which conditioning, which latent), or None if unknown.
        video_tokens: tokens that the latent makes, or None if unknown; a sequence may hold more.
        window: identity of the context window, or None.
        stays_dense: why every call of this pass stays dense, or None.
    """

    def __init__(self, parts: RunParts, number: int, *, model: Hashable, rows: Sequence[Hashable] | None,
                 video_tokens: int | VideoTokens | None, window: Hashable = None, stays_dense: Reason | None = None):
        self._parts = parts
        self._number = number
        self._model = model
        self._rows = rows
        self._video_tokens = video_tokens
        self._window = window
        self._stays_dense = stays_dense
        self._ordinals: Counter[str] = Counter()

    def attend(self, call: AttentionCall, layer: LayerId | None, fallback: Callable[[], Tensor]) -> Tensor:
        """The call's result in the layout that its caller wants: from the sparse kernel, or from `fallback()`.

        Never raises on behalf of sparse attention, out-of-memory excepted: `fallback` computes every call that cannot
        be sparse, counted by reason.
        """
        parts = self._parts
        over_video, shape = False, None
        try:
            reason = self._other_attention(call, layer)
            if reason is None:
                over_video, shape = True, self._shape(call)
                decision = self._decide(call, layer)
                done = self._compute(call, decision, shape) if isinstance(decision, Plan) else decision
                if not isinstance(done, Reason):
                    return done
                reason = done
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = parts.sparse.give_up(str(layer), error)
        batch, tiles = call.batch, _tiles(call) if over_video else 0  # asked now: `fallback` may release the call
        with parts.times.timed(shape, DENSE, batch, every_tile=reason in _COMPARABLE):
            out = fallback()
        parts.counters.add_dense(self._number, reason, tiles)
        return out

    def _other_attention(self, call: AttentionCall, layer: LayerId | None) -> Reason | None:
        """Why the call is no self-attention over the video's tokens that a kernel serves, or None."""
        not_video = token_reason(call.seqlen_q, self._video_tokens, call.heads * call.head_dim)
        if not_video is None and call.seqlen_q == call.seqlen_k:
            # Dense calls are numbered too: one that is dense in some passes only must not hand its mask to the next.
            self._ordinals[str(layer)] += 1
        return call_reason(call, self._parts.config.min_tokens) or (NO_LAYER if layer is None else not_video)

    def _decide(self, call: AttentionCall, layer: LayerId) -> Plan | Reason:
        """How a self-attention over the video's tokens is computed, or why it stays dense. Changes no state of the run.
        """
        parts, phase = self._parts, self._parts.phase()
        if self._rows is None or len(self._rows) != call.batch:
            return NO_ROWS
        if self._stays_dense is not None:
            return self._stays_dense
        if parts.dense_blocks.holds(layer.index, layer.total):
            return DENSE_BLOCK
        if phase is Phase.END:
            return DENSE_END
        if parts.sparse.backend(call.q.device) is None:
            return NO_BACKEND
        key = LayerKey(self._model, call.q.device, str(layer), self._ordinals[str(layer)] - 1, self._window)
        reason = parts.sparse.reason(key)
        if reason is not None:
            return reason
        if parts.times.dense_faster(key):
            return DENSE_FASTER
        grid = VideoTokens.of(self._video_tokens).grid_in(call.seqlen_q)
        signature = Signature(call.heads, call.seqlen_q, call.head_dim, call.q.dtype, grid)
        if phase is not Phase.SPARSE:
            states = parts.masks.states(key, self._rows, signature)
            # Rows that were carried over need no warm-up. A row that recorded in this very step waits for the next one,
            # unless it shares a call with one that has yet to record.
            if not any(state.carried for state in states) and (
                    phase is Phase.WARMUP or all(state.recorded for state in states)):
                return WARMUP
        return Plan(key, self._rows, signature, parts.config.rule.skip_test(key, parts.step(), call.seqlen_k),
                    must_keep_tokens(call.seqlen_q, self._video_tokens), restart=phase is not Phase.SPARSE)

    def _compute(self, call: AttentionCall, plan: Plan, shape: CallShape | None) -> Tensor | Reason:
        """The result of a sparse call, which is counted, or why it stays dense."""
        parts = self._parts
        computed = parts.counters.on_device(plan.key)
        states = parts.masks.states(plan.key, plan.rows, plan.signature)
        every_tile = not any(state.recorded and not (plan.restart and not state.carried) for state in states)
        with parts.times.timed(shape, SPARSE, call.batch, every_tile) as sample:
            done = parts.sparse.compute(call, plan, computed)
            if isinstance(done, Reason):
                sample.discard()
                return done
        out, fresh = done
        tiles = _tiles(call)
        parts.counters.add_sparse(self._number, plan.key, tiles, fresh * tiles // call.batch, call.seqlen_q)
        parts.times.add_sparse(plan.key, shape)
        return out

    def _shape(self, call: AttentionCall) -> CallShape | None:
        """What the time of the call depends on; None where nothing is timed."""
        device = call.q.device
        if self._parts.sparse.backend(device) is None:
            return None
        return CallShape(device, call.heads, call.seqlen_q, call.head_dim, call.q.dtype,
                         self._parts.sparse.precision(call))


def _tiles(call: AttentionCall) -> int:
    return call_tiles(call.batch, call.heads, call.seqlen_q, call.seqlen_k)
