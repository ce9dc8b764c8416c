"""One sampling run: made at its start, closed at its end; and the handle by which later nodes read it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from .compute import SparseAttention
from .config import LiteAttentionConfig, parse_blocks
from .counters import Counters
from .forward import ForwardPass, RunParts
from .masks import CarriedMasks, MaskTable
from .notes import Notes
from .schedule import Phase, StepPlan
from .summary import RunSummary, StepReport, advise
from .timing import AttentionTimes, BreakEvens
from .video_tokens import VideoTokens

log = logging.getLogger("LiteAttention")

SILENT_EVALUATIONS = 3
"""No sampler of ComfyUI evaluates its model more often before it reports a step."""

NO_RUN = "the run to continue has not happened"
NOT_FINISHED = "the run to continue did not finish"
SEVERAL = "several runs of that node happened in this prompt, and which one to continue is not certain"
NOTHING = "the run to continue has recorded no masks"
LOST = "the masks of the run to continue could not be carried over"


class RunHandle:
    """What the node hands to later nodes: the summary of its last finished run and, in main memory until its next run
    starts, the masks of that run.

    Attributes:
        summary, masks, layout: of the last run; None before it has finished, or where it has none.
        continued: whether other runs go on with the masks.
    """

    def __init__(self, continued: bool = False) -> None:
        self.continued = continued
        self.summary: RunSummary | None = None
        self.masks: CarriedMasks | None = None
        self.layout: VideoTokens | None = None
        self._prompt: Hashable = None
        self._several = False
        self._why = NO_RUN

    def start(self, prompt: Hashable = None) -> None:
        """A run starts; the masks of the one before are freed.

        Args:
            prompt: identity of the prompt that the run belongs to, or None if unknown.
        """
        # Two samplers behind one node: nobody can tell which of them to continue.
        self._several = prompt is not None and prompt == self._prompt and (self._several or self.masks is not None)
        self.masks = self.layout = None
        self._prompt, self._why = prompt, NOT_FINISHED

    def finish(self, run: SamplingRun) -> None:
        """The last step of `run` is over; it is about to be closed."""
        self.masks, self._why = run.carry()
        self.layout = run.layout

    def carried(self) -> tuple[CarriedMasks | None, str]:
        """(the masks for a run that continues the last one, ""), or (None, why there are none)."""
        return (None, SEVERAL) if self._several else (self.masks, self._why)


class SamplingRun:
    """State of one sampling run, made at its start and closed in its `finally`.

    Two clocks: masks age by the recording passes of their own row (one per model evaluation); the phase moves with
    the sampler's steps. Second-order samplers evaluate the model more often than they step, step caches less.

    Args:
        config: the node's settings.
        total_steps: steps of this run.
        on_step: called with the report of each step.
        allocating: gives a context manager to hold around allocations that outlive a call.
        break_evens: what earlier runs with the same fallback attention have timed, and where this one adds.
        carried: masks of the run that this one continues.
        continued: whether another run goes on with the masks of this one.
        faster_dense: a sentence that names a faster attention for dense calls, where there is one.

    Attributes:
        step: from 0. layout: of the last forward pass.
        unreached: why no self-attention reached the pack, from the host; "" where one did.
    """

    def __init__(self, config: LiteAttentionConfig, total_steps: int, *,
                 on_step: Callable[[StepReport], None] | None = None,
                 allocating: Callable[[], AbstractContextManager] = nullcontext,
                 break_evens: BreakEvens | None = None, carried: CarriedMasks | None = None,
                 continued: bool = False, faster_dense: str = ""):
        self.config = config
        self.plan = StepPlan(total_steps, config.warmup_steps, config.dense_end_steps, continued)
        self.notes = Notes()
        self.masks = MaskTable(allocating, carried, self.notes.add)
        self.counters = Counters(allocating)
        self.sparse = SparseAttention(config, self.masks, self.notes, allocating)
        self.times = AttentionTimes(break_evens if break_evens is not None else BreakEvens(), self.notes.add,
                                    self.plan.trial_steps)
        self.step = 0
        self.unreached = ""
        self.layout: VideoTokens | None = None
        self._parts = RunParts(config, parse_blocks(config.dense_blocks), lambda: self.step, self.phase, self.masks,
                               self.sparse, self.counters, self.times)
        self._faster_dense = faster_dense
        self._on_step = on_step
        self._began: float | None = None
        self._seconds: float | None = None
        self._carried_bytes = 0
        self._evaluations = 0
        self._reports_steps = False
        self._numbers = itertools.count()
        self._summary: RunSummary | None = None

    def forward_pass(self, **context: Any) -> ForwardPass:
        """The context of one forward pass of a model; arguments: see `ForwardPass`."""
        if self._began is None:  # not earlier: weights are loaded before the first evaluation
            self._began = time.perf_counter()
        tokens = context.get("video_tokens")
        self.layout = None if tokens is None else VideoTokens.of(tokens)
        return ForwardPass(self._parts, next(self._numbers), **context)

    @property
    def evaluated(self) -> bool:
        """Whether a model was evaluated."""
        return self._began is not None

    def begin_evaluation(self) -> None:
        """The sampler calls its model. Where it reports no steps, every further evaluation counts as one."""
        self._evaluations += 1
        if not self._reports_steps and self._evaluations > SILENT_EVALUATIONS:
            self.notes.add("the sampler reports no steps; every evaluation of the model counts as one")
            self._end_step(self.step)

    def phase(self) -> Phase:
        """The phase of the current step."""
        return self.plan.phase(self.step)

    def end_step(self, step: int) -> StepReport:
        """The sampler has finished `step` (counted from 0)."""
        self._reports_steps = True
        return self._end_step(step)

    def _end_step(self, step: int) -> StepReport:
        phase = self.phase()
        if phase in (Phase.WARMUP, Phase.RECORD) and self.masks.carried_rows:
            phase = Phase.SPARSE
        # Advance first: a failed read of the counters must not stop the run.
        number, self.step = self.step, max(self.step, step + 1)
        skipped = self.counters.end_step(number)
        self.times.end_step(self.counters.densities())
        if self._began is not None:
            self._seconds = time.perf_counter() - self._began
        report = StepReport(number + 1, self.plan.total_steps, skipped, self.counters.skipped_so_far(),
                            self.masks.nbytes, phase.value, self.times.saved(self.counters))
        if self._on_step is not None:
            self._on_step(report)
        return report

    def finish(self) -> None:
        """The sampler has returned. Where it has reported no steps, that was the last one."""
        if self.evaluated and not self._reports_steps:
            self._end_step(self.plan.total_steps - 1)

    def carry(self) -> tuple[CarriedMasks | None, str]:
        """(the masks, in main memory, ""), or (None, why there are none). Never raises."""
        if self.sparse.failed:
            return None, LOST
        try:
            carried = self.masks.carry()
        except Exception as error:
            self.notes.add("the masks of this run could not be carried over. "
                           f"{type(error).__name__}: {str(error)[:200]}")
            return None, LOST
        self._carried_bytes = carried.nbytes
        return (carried, "") if carried.nbytes else (None, NOTHING)

    def close(self) -> RunSummary:
        """Free everything and give the summary of the run. Safe to call again."""
        if self._summary is None:
            try:
                self.counters.end_step(self.step)
            except Exception as error:
                # After an error on the device its counters cannot be read; the memory is freed all the same.
                log.warning("LiteAttention: the counters of the last step are lost: %s", str(error))
            try:
                self._summary = self._summarize()
            finally:
                self.masks.close()
                self.counters.close()
                self.sparse.close()
        return self._summary

    def _summarize(self) -> RunSummary:
        counters, steps = self.counters, max(self.step, 1)
        summary = RunSummary(
            plan=self.plan.describe(self.masks.carried_rows > 0), rule=self.config.rule.text,
            steps_done=self.step, total_steps=self.plan.total_steps, forward_passes=counters.forward_passes,
            sparse_calls=counters.sparse, dense_calls=dict(counters.dense),
            tiles_computed=counters.tiles_computed, tiles_total=counters.tiles_total, dense_tiles=counters.dense_tiles,
            skipped_per_step=counters.shares(steps), layers=counters.layer_shares(steps),
            mask_bytes=self.masks.peak_bytes, tokens=counters.tokens, backend=self.sparse.describe(),
            fallback=counters.dense_by_text(), carried_bytes=self._carried_bytes, break_evens=self.times.report(),
            saved=self.times.saved(counters), seconds=self._seconds, settings=self.config.to_dict(),
            notes=self.notes.lines(), unreached=self.unreached)
        return replace(summary, advice=advise(summary, self.config.rule, self._faster_dense))
