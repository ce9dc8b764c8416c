"""One forward pass of a model: each attention call is decided, computed and counted here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels import call_tiles
from .call import AttentionCall
from .compute import Plan, SparseAttention, is_out_of_memory
from .config import BlockSet, LiteAttentionConfig
from .counters import Counters
from .masks import LayerKey, MaskTable, Signature
from .reasons import (
    CACHED_KEYS,
    DENSE_BLOCK,
    DENSE_END,
    DENSE_FASTER,
    FRAME_BY_FRAME,
    NO_BACKEND,
    NO_LAYER,
    NO_ROWS,
    QUERY_PIECES,
    WARMUP,
    Reason,
    call_reason,
)
from .schedule import Phase
from .sites import Site, Sites
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
    """What the forward passes of a run share.

    Attributes:
        step: from 0. dense_blocks: as parsed from the settings. pieces: what `Sites` knows.
    """

    config: LiteAttentionConfig
    dense_blocks: BlockSet
    step: Callable[[], int]
    phase: Callable[[], Phase]
    masks: MaskTable
    sparse: SparseAttention
    counters: Counters
    times: AttentionTimes
    pieces: set[tuple[str, int, tuple[int, ...]]] = field(default_factory=set)


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
        all_heads = None if video_tokens is None else VideoTokens.of(video_tokens).heads
        self._sites = Sites(all_heads, parts.pieces)

    def attend(self, call: AttentionCall, layer: LayerId | None, fallback: Callable[[], Tensor],
               dense_by: str = "") -> Tensor:
        """The call's result in the layout that its caller wants: from the sparse kernel, or from `fallback()`, whose
        display name is `dense_by`.

        Never raises on behalf of sparse attention, out-of-memory excepted: `fallback` computes every call that cannot
        be sparse, counted by reason.
        """
        parts = self._parts
        over_video, site, shape = False, None, None
        try:
            site = self._site(call, layer)
            reason = self._other_attention(call, layer, site)
            if reason is None:
                over_video, shape = True, self._shape(call, dense_by)
                decision = self._decide(call, layer, site, shape)
                done = self._compute(call, decision, shape, site.first) if isinstance(decision, Plan) else decision
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
        parts.counters.add_dense(self._number, reason, tiles, dense_by, calls=int(site is None or site.first))
        return out

    def decline(self, reason: Reason, fallback: Callable[[], Tensor], dense_by: str = "") -> Tensor:
        """The result of a call that the host keeps dense, counted by `reason`."""
        out = fallback()
        self._parts.counters.add_dense(self._number, reason, 0, dense_by)
        return out

    def _site(self, call: AttentionCall, layer: LayerId | None) -> Site | None:
        """Which self-attention over the video's tokens the call is or is a part of, or None. Dense calls are numbered
        too: one that is dense in some passes only must not hand its mask to the next."""
        if self._not_video(call, layer) is not None:
            return None
        if call.seqlen_q == call.seqlen_k:
            return self._sites.whole(call, str(layer))
        is_piece = call.seqlen_q < min(VideoTokens.of(self._video_tokens).count, call.seqlen_k)
        return self._sites.piece(call, str(layer)) if is_piece else None

    def _not_video(self, call: AttentionCall, layer: LayerId | None) -> Reason | None:
        video, width = self._video_tokens, call.heads * call.head_dim
        if video is not None and self._sites.is_group(str(layer), call.heads):
            width = VideoTokens.of(video).heads * call.head_dim
        return token_reason(call.seqlen_k, video, width)

    def _other_attention(self, call: AttentionCall, layer: LayerId | None, site: Site | None) -> Reason | None:
        """Why the call is no self-attention over the video's tokens that a kernel serves, or None."""
        piece = site is not None and len(site.queries) < call.seqlen_k
        if site is None and self._stays_dense in (CACHED_KEYS, FRAME_BY_FRAME) and call.seqlen_q < call.seqlen_k:
            return self._stays_dense  # keys of other frames than those of this pass
        return call_reason(call, self._parts.config.min_tokens, piece) or (
            NO_LAYER if layer is None else self._not_video(call, layer) if site is None else None)

    def _decide(self, call: AttentionCall, layer: LayerId, site: Site, shape: CallShape | None) -> Plan | Reason:
        """How a self-attention over the video's tokens is computed, or why it stays dense. Changes no state of the run.
        """
        parts, phase = self._parts, self._parts.phase()
        if self._rows is None or len(self._rows) != call.batch:
            return NO_ROWS
        if self._stays_dense is not None:
            return self._stays_dense
        if not site.adds_up:
            return QUERY_PIECES
        if parts.dense_blocks.holds(layer.index, layer.total):
            return DENSE_BLOCK
        if phase is Phase.END:
            return DENSE_END
        if parts.sparse.backend(call.q.device) is None:
            return NO_BACKEND
        pieces = len(site.queries) < call.seqlen_k
        key = LayerKey(self._model, call.q.device, str(layer), site.ordinal, self._window,
                       site.piece if pieces else None)
        reason = parts.sparse.reason(key)
        if reason is not None:
            return reason
        if parts.times.dense_faster(key):
            return DENSE_FASTER
        grid = VideoTokens.of(self._video_tokens).grid_in(call.seqlen_k)
        signature = Signature(site.all_heads, call.seqlen_k, call.head_dim, call.q.dtype, None if pieces else grid,
                              len(site.queries) if pieces else None)
        if phase is not Phase.SPARSE:
            states = parts.masks.states(key, self._rows, signature, site.heads)
            # Rows that were carried over need no warm-up. A row that recorded in this very step waits for the next one,
            # unless it shares a call with one that has yet to record.
            if not any(state.carried for state in states) and (
                    phase is Phase.WARMUP or all(state.recorded for state in states)
                    or parts.times.wants_dense(shape, layer.index)):
                return WARMUP
        return Plan(key, self._rows, signature, site.heads,
                    parts.config.rule.skip_test(key, parts.step(), call.seqlen_k),
                    must_keep_tokens(call.seqlen_k, self._video_tokens, site.queries),
                    restart=phase is not Phase.SPARSE)

    def _compute(self, call: AttentionCall, plan: Plan, shape: CallShape | None, counted: bool) -> Tensor | Reason:
        """The result of a sparse call, or why it stays dense. `counted`: it is no further part of an attention."""
        parts = self._parts
        computed = parts.counters.on_device(plan.key)
        states = parts.masks.states(plan.key, plan.rows, plan.signature, plan.heads)
        every_tile = not any(state.recorded and not (plan.restart and not state.carried) for state in states)
        with parts.times.timed(shape, SPARSE, call.batch, every_tile) as sample:
            done = parts.sparse.compute(call, plan, computed)
            if isinstance(done, Reason):
                sample.discard()
                return done
        out, fresh = done
        tiles = _tiles(call)
        parts.counters.add_sparse(self._number, plan.key, tiles, fresh * tiles // call.batch, call.seqlen_k,
                                  calls=int(counted))
        parts.times.add_sparse(plan.key, shape)
        return out

    def _shape(self, call: AttentionCall, dense_by: str) -> CallShape | None:
        """What the time of the call depends on; None where nothing is timed."""
        device = call.q.device
        if call.seqlen_q != call.seqlen_k or self._parts.sparse.backend(device) is None:
            return None
        return CallShape(device, call.heads, call.seqlen_q, call.head_dim, call.q.dtype,
                         self._parts.sparse.precision(call), dense_by)


def _tiles(call: AttentionCall) -> int:
    return call_tiles(call.batch, call.heads, call.seqlen_q, call.seqlen_k)
