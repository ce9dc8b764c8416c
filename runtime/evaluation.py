"""One forward pass of a model: every attention call of it is taken or left here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import Reopened, SkipMask, UnsupportedAttention, call_tiles, lite_attention
from . import policy
from .call import AttentionCall
from .dispatch import DENSE, OURS, SAMPLES, CallShape
from .schedule import Phase
from .state import LayerKey

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True)
class LayerId:
    """How a model names the block that calls: its type, number and, where known, the number of blocks."""

    kind: str
    index: int
    total: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


class Evaluation:
    """The context of one forward pass; made by `Session.evaluation`, used by one thread.

    Takes part of no state that a half-finished forward pass could leave behind: the next pass has its own object.
    """

    def __init__(self, session: Session, number: int, model: Hashable, rows: Sequence[Hashable] | None,
                 latent_tokens: int | None, window: Hashable, leave: str | None):
        self.session = session
        self.number = number
        self.model = model
        self.rows = rows
        self.latent_tokens = latent_tokens
        self.window = window
        self.leave = leave
        self._ordinals: Counter[str] = Counter()
        self._aside = 0.0

    def attend(self, call: AttentionCall, layer: LayerId | None, previous: Callable[[], Tensor],
               repeatable: bool = True) -> Tensor:
        """The call's result in the layout that its caller wants: from our kernel, or from `previous()`.

        Never raises on behalf of skip-mask attention: what it cannot serve, `previous` computes, counted by reason.

        Args:
            repeatable: `previous` leaves q, k, v as they are, so that it may be called for its time alone.
        """
        session = self.session
        self._aside = 0.0
        started = self._clock(call.q.device)
        out, over_video = None, False
        try:
            not_video = policy.token_reason(call.seqlen_q, self.latent_tokens, call.heads * call.head_dim)
            ordinal = self._ordinal(layer) if not_video is None and call.seqlen_q == call.seqlen_k else 0
            reason, over_video = self._reason(call, layer, not_video)
            if reason is None:
                out, reason = self._take(call, layer, ordinal, previous if repeatable else None)
        except Exception as error:
            if policy.is_out_of_memory(error):
                raise
            reason = self._give_up(str(layer), error)
        if out is not None:
            tiles = call_tiles(call.batch, call.heads, call.seqlen_q, call.seqlen_k)
            seconds = self._clock(call.q.device) - started - self._aside
            session.statistics.count_taken(self.number, tiles, call.seqlen_q, seconds)
            return out
        comparable = reason in (Phase.WARMUP.value, policy.DENSE_BLOCK, policy.DENSE_FASTER)
        # Asked for now: `previous` may have the call released.
        shape, batch, device = self._shape(call) if comparable else None, call.batch, call.q.device
        dense_tiles = call_tiles(call.batch, call.heads, call.seqlen_q, call.seqlen_k) if over_video else 0
        with session.dispatcher.timed(shape, DENSE, batch):
            out = previous()
        session.statistics.count_left(self.number, reason, dense_tiles, self._clock(device) - started)
        return out

    def _ordinal(self, layer: LayerId | None) -> int:
        """Which self-attention over the video's tokens this is in its block. Those that are left count too: one that
        is left in some passes only must not hand its mask to the next one."""
        self._ordinals[str(layer)] += 1
        return self._ordinals[str(layer)] - 1

    def _reason(self, call: AttentionCall, layer: LayerId | None, not_video: str | None) -> tuple[str | None, bool]:
        """Why the call is left to the previous attention, and whether it is one over the video's tokens.

        Args:
            not_video: why its tokens may not be the video's, or None.
        """
        session = self.session
        reason = policy.call_reason(call, session.config.min_tokens)
        if reason is None and layer is None:
            reason = policy.NO_LAYER
        reason = reason or not_video
        if reason is not None:
            return reason, False
        if self.rows is None or len(self.rows) != call.batch:
            return policy.NO_ROWS, True
        if self.leave is not None:
            return self.leave, True
        if session.failed:
            return policy.KERNEL_FAILED, True
        if session.dense_blocks.holds(layer.index, layer.total):
            return policy.DENSE_BLOCK, True
        phase = session.phase()
        # Rows that continue an earlier run need no warm-up; `_take` tells which rows do.
        if phase is Phase.END or (phase is Phase.WARMUP and not session.continuing):
            return phase.value, True
        if session.backend(call.q.device) is None:
            return policy.NO_BACKEND, True
        return None, True

    def _take(self, call: AttentionCall, layer: LayerId, ordinal: int,
              previous: Callable[[], Tensor] | None) -> tuple[Tensor | None, str | None]:
        """(result, None), or (None, reason)."""
        session = self.session
        device = call.q.device
        key = LayerKey(self.model, device, str(layer), ordinal, self.window)
        if session.masks.is_dense(key):
            return None, policy.OVER_STATE_LIMIT
        reason = session.room.reason(key, layer, self.rows, call.heads, call.seqlen_q)
        if reason is not None:
            return None, reason
        reason = self._profile_reason(call, key)
        if reason is not None:
            return None, reason
        density = session.statistics.density(key, device)
        if session.dispatcher.prefers_previous(key, self._shape(call), density):
            return None, policy.DENSE_FASTER
        try:
            masks = session.masks.masks(key, self.rows, call.heads, call.seqlen_q, call.head_dim, call.q.dtype)
        except Exception as error:
            if policy.is_out_of_memory(error):
                session.note(f"no memory for the skip mask of layer {layer}; it stays dense")
                session.room.starve(key)
                session.masks.forget(key)
                return None, policy.NO_MEMORY
            return None, self._give_up(key.name, error)
        phase = session.phase()
        if phase is not Phase.SPARSE:
            own = session.masks.fresh_rows(key, self.rows)
            if len(own) == call.batch and (phase is Phase.WARMUP or all(mask.passes[0] for mask in own)):
                return None, Phase.WARMUP.value
            # Rows recorded at different evaluations of this step, or next to rows that continue an earlier run: the
            # step stays dense for all of them.
            for mask in own:
                mask.reset()
        restart = session.restarts(key)
        for mask in masks if restart else ():
            mask.reopen(1, 0)
        fresh = call.batch if restart else sum(not mask.passes[0] for mask in masks)
        if previous is not None and fresh == call.batch and session.plan.dense_steps < 2:
            self._sample_dense(call, previous)
        out, reason = self._run(call, key, masks, fresh)
        if out is not None:
            row_tiles = call_tiles(1, call.heads, call.seqlen_q, call.seqlen_k)
            session.statistics.count_layer(key, device, call.batch * row_tiles, fresh * row_tiles)
        if out is not None and (fresh or session.masks.grown):
            for name in session.masks.enforce_limit():
                session.note(f"masks reached max_state_mb = {session.config.max_state_mb}: layer {name}, which skips "
                             "least, stays dense")
        return out, reason

    def _profile_reason(self, call: AttentionCall, key: LayerKey) -> str | None:
        """Why the run's profile does not serve this layer, or None."""
        profile = self.session.profile
        if profile is None:
            return None
        problem = profile.layer_problem(key.profile_name, call.heads, call.head_dim)
        if problem is None:
            warning = profile.size_warning(call.seqlen_k)
            if warning:
                self.session.note(warning)
            return None
        if profile.layer(key.profile_name) is None:
            return policy.NOT_IN_PROFILE
        self.session.note(problem)
        return policy.PROFILE_SIZE

    def _run(self, call: AttentionCall, key: LayerKey, masks: list[SkipMask],
             fresh: int) -> tuple[Tensor | None, str | None]:
        """As `_take`; `fresh` rows record for the first time."""
        session = self.session
        # A call that computes every tile can be compared with a dense one.
        shape = self._shape(call) if fresh == call.batch else None
        reopened: list[Reopened] = []
        try:
            every = session.config.refresh_every
            reopened += (mask.reopen(every, mask.passes[0]) for mask in masks if every and mask.passes[0])
            out = None
            while out is None:
                precision, pool_skipped = self._precision(call), session.pool_skipped
                try:
                    with session.dispatcher.timed(shape, OURS, call.batch) as timed:
                        out = self._attention(call, key, masks, bool(fresh) and not timed and not reopened, precision,
                                              pool_skipped)
                except Exception as error:
                    if not (policy.is_out_of_memory(error) and session.do_without(precision, pool_skipped)):
                        raise
                # Outside the handler, whose traceback would keep what did fit. A second try is no sample of the time.
                shape = None
            session.statistics.count_reopened(reopened, key.device)
        except UnsupportedAttention as error:
            for query_tiles in reversed(reopened):  # a mask may be there twice
                query_tiles.words.copy_(query_tiles.before)
            session.note(f"layer {key.name} left as it was: {error}")
            return None, error.reason
        except Exception as error:
            session.masks.forget(key)
            if policy.is_out_of_memory(error):
                raise
            return None, self._give_up(key.name, error)
        return call.restore(out), None

    def _sample_dense(self, call: AttentionCall, previous: Callable[[], Tensor]) -> None:
        """Time a few dense calls beside the first recording ones, in runs whose warm-up leaves none to the previous
        attention (few steps): without them nobody can tell which is faster, and by how much. Never raises."""
        session, device, out = self.session, call.q.device, None
        wanted = session.config.log_details and session.statistics.sampled_calls < SAMPLES
        started = self._clock(device)
        with session.dispatcher.sample(self._shape(call), call.batch) as timed:
            out = previous() if timed or wanted else None
        self._aside = self._clock(device) - started
        if out is not None:
            tiles = call_tiles(call.batch, call.heads, call.seqlen_q, call.seqlen_k)
            session.statistics.count_sample(tiles, self._aside)

    def _attention(self, call: AttentionCall, key: LayerKey, masks: list[SkipMask], skip_now: bool,
                   precision: str, pool_skipped: bool) -> Tensor:
        session = self.session
        threshold, criterion = session.skip_test(key, call.seqlen_k)
        return lite_attention(
            call.q, call.k, call.v, masks, heads=call.packed_heads, sm_scale=call.sm_scale,
            threshold=threshold, criterion=criterion, skip_now=skip_now, pool_skipped=pool_skipped,
            must_keep=policy.must_keep_tokens(call.seqlen_q, self.latent_tokens), precision=precision,
            backend=session.backend(key.device), workspace=session.workspace(key.device),
            computed=session.statistics.counters(key, key.device))

    def _precision(self, call: AttentionCall) -> str:
        return self.session.precision(call.q.device, call.head_dim, call.q.dtype, call.seqlen_k)

    def _shape(self, call: AttentionCall) -> CallShape | None:
        """What a comparison with the previous attention depends on; None where there is nothing to compare."""
        device = call.q.device
        if not self.session.dispatcher.enabled or self.session.failed or self.session.backend(device) is None:
            return None
        try:
            precision = self._precision(call)
        except Exception:  # the call itself meets it again, where it is noted
            return None
        return CallShape(device, call.heads, call.seqlen_q, call.head_dim, call.q.dtype, precision)

    def _give_up(self, layer: str, error: Exception) -> str:
        """Leave every further call of the run to the previous attention, and say why."""
        self.session.failed = True
        self.session.note(f"the kernel failed at layer {layer} and is not tried again in this run; attention goes "
                          f"on as it was before. {type(error).__name__}: {str(error)[:300]}")
        return policy.KERNEL_FAILED

    def _clock(self, device: torch.device) -> float:
        """Seconds, after the device has caught up; 0 unless details are logged."""
        if not self.session.config.log_details:
            return 0.0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
