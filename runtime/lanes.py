"""The search of a calibration: which thresholds one layer bears. Numbers and masks only, no attention.

A *lane* is what a production run would do in one layer: masks that are carried along, and the thresholds that they were
recorded with. Each layer has two. Both are measured against dense attention in every call of a step:

* the *steady* lane has kept every call of the run so far within the target;
* the *bold* lane is the steady one with tiles dropped by one more recording, at a threshold on trial. If a step with
  it stays within the aim, it is the steady lane from there on; else it is forgotten: the steady lane dropped nothing.

A mask only shrinks, and what was right to drop can be wrong later: at a step where the steady lane exceeds its limit
it *restarts* with every tile active, and so will the runs with the profile. So each call of the lane that is left at
the end is within the target. (Where a sampler evaluates the model more than once in a step, evaluations that follow a
recording within its step are not measured with what it dropped; those of the next step are.)

The thresholds on trial follow a staircase: up after a trial that passed, down after one that failed, by steps that grow
while the answer stays the same and shrink when it changes. The error alone would not do: it can stand still over a wide
range of thresholds, and depends on what was dropped before.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from ..kernels import SkipMask
from .config import THRESHOLD_MAX, THRESHOLD_MIN

AIM_FIRST, AIM, AIM_FROM = 0.7, 0.8, 0.5
"""Shares of the target that a trial may come to: at the start, where a drop has longest to go wrong, and from this part
of the run on. The rest is for what changes after the trial, and for other prompts (benchmarks/calibration.py)."""
RISE, RISE_MIN, RISE_MAX, GROWTH = 0.5, 0.125, 2.0, 1.5
"""Steps of the staircase, log2, and what they grow by."""


@dataclass
class Lane:
    """A production run of one layer.

    Attributes:
        masks: by batch row of a layer; a row without one skips nothing yet.
        thresholds: of the steps that dropped something, log2.
        restarts: steps that began with every tile active again.
        errors: worst error of each step.
        share: skipped share of the tiles in the open step, 0..1, of the call that skips most.
        skips: whether it may have dropped a tile since it began.
        trial: threshold that this step's calls record with, for a branch.
        recorded: the masks after such a recording.
    """

    masks: dict[Hashable, SkipMask] = field(default_factory=dict)
    thresholds: dict[int, float] = field(default_factory=dict)
    restarts: frozenset[int] = frozenset()
    errors: dict[int, float] = field(default_factory=dict)
    share: float = 0.0
    skips: bool = False
    trial: float = THRESHOLD_MIN
    recorded: dict[Hashable, SkipMask] = field(default_factory=dict)

    def mask(self, place: Hashable, carried: SkipMask) -> SkipMask:
        """This lane's mask where the session carries `carried`, as old as that; a full one if that is new."""
        mask = self.masks.get(place)
        if mask is None or not carried.passes[0]:
            mask = SkipMask.full(1, carried.heads, carried.seqlen_q, carried.seqlen_k, carried.device)
            self.masks[place] = mask
        mask.passes = list(carried.passes)
        return mask

    def measured(self, step: int, error: float, share: float = 0.0) -> None:
        """A call's error and the share of its tiles that it skipped."""
        self.errors[step] = max(self.errors.get(step, 0.0), error)
        self.share = max(self.share, share)

    def branch(self, step: int) -> Lane:
        """The lane that has recorded with the trial threshold in `step`."""
        return Lane({**self.masks, **self.recorded}, {**self.thresholds, step: self.trial}, self.restarts,
                    dict(self.errors), skips=True)

    def restarted(self, step: int) -> Lane:
        """The lane that has computed every tile in `step`."""
        return Lane({}, dict(self.thresholds), self.restarts | {step}, {**self.errors, step: 0.0})

    def row(self, steps: list[int]) -> tuple[float, ...]:
        """Its thresholds at these steps; one that dropped nothing has the lowest."""
        return tuple(self.thresholds.get(step, THRESHOLD_MIN) for step in steps)


class Staircase:
    """Thresholds to try, one after the other: `value` now, `next(passed)` after its answer."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.size = RISE
        self._passed: bool | None = None

    def next(self, passed: bool) -> float:
        """The threshold to try after this answer, log2."""
        return _limited(self.value + (1 if passed else -1) * self._size(passed))

    def answer(self, passed: bool) -> None:
        """The trial of `value` has passed or not."""
        self.value, self.size, self._passed = self.next(passed), self._size(passed), passed

    def _size(self, passed: bool) -> float:
        if self._passed is None:
            return self.size
        return min(self.size * GROWTH, RISE_MAX) if passed == self._passed else max(self.size / 2, RISE_MIN)


class LayerCalibration:
    """The two lanes of one layer.

    Args:
        target: what no call may exceed.
        start: the threshold to try first, log2.
    """

    def __init__(self, heads: int, head_dim: int, target: float, start: float):
        self.heads, self.head_dim, self.target = heads, head_dim, target
        self.step: int | None = None
        self.bold: Lane | None = None
        self.steady = Lane()
        self.stairs = Staircase(start)
        self._aim = AIM_FIRST * target

    @property
    def lanes(self) -> list[Lane]:
        """Those to be measured in a call, the boldest first."""
        return [self.steady] if self.bold is None else [self.bold, self.steady]

    def limit(self, lane: Lane) -> float:
        """The error that a lane may have in the open step: a trial has to leave room for what comes, and the more of
        a call rests on what was dropped, the more another prompt can change."""
        return (self._aim if lane is self.bold else self.target) * (1 - lane.share)

    def begin(self, step: int, progress: float) -> None:
        """The calls of `step` follow."""
        if step == self.step:
            return
        self._close()
        self.step = step
        self._aim = self.target * (AIM_FIRST + (AIM - AIM_FIRST) * min(progress / AIM_FROM, 1.0))
        if self.bold is None:
            self.steady.trial = self.stairs.value
        else:
            self.bold.trial, self.steady.trial = self.stairs.next(True), self.stairs.next(False)
        for lane in self.lanes:
            lane.share = 0.0
            lane.measured(step, 0.0)

    def _close(self) -> None:
        """The step is over: which lane goes on."""
        step, bold, steady = self.step, self.bold, self.steady
        if step is None:
            return
        passed = bold is not None and bold.errors[step] <= self.limit(bold)
        if bold is not None:
            self.stairs.answer(passed)
        best = bold if passed else steady
        if best.errors[step] > self.limit(best):
            self.steady, self.bold = steady.restarted(step), None
            return
        self.steady, self.bold = best, best.branch(step)
        best.recorded = {}

    def finish(self) -> Lane:
        """The lane that is left when the last step is over."""
        self._close()
        self.step = None
        return self.steady


def _limited(threshold: float) -> float:
    return min(max(threshold, THRESHOLD_MIN), THRESHOLD_MAX)
