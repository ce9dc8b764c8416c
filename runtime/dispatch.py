"""Which attention is faster for a layer: break-even densities, from the kernels' table or timed during a run."""

from __future__ import annotations

import math
import statistics
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..kernels import break_even_density, call_tiles

MARGIN = 0.97
"""Below 1, because the time of our kernel falls a little less than its share of tiles."""
QUANTUM = 0.05
"""Steps of a measured break-even, so that the noise of a timer rarely decides for another attention."""
DENSITY_MIN = 0.05
SAMPLES = 3
"""Calls that count on either side; one more before them compiles, plans and warms up, and is thrown away."""
PROBE_EVERY = 4
"""Of so many steps that a layer is too dense for, one still runs ours, so that its masks keep shrinking."""
DENSE, OURS = "dense", "ours"


class CallShape(NamedTuple):
    """What the break-even depends on. `precision`: "full" or "int8", as the call is computed."""

    device: torch.device
    heads: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype
    precision: str

    @property
    def tiles(self) -> int:
        """Of one batch row."""
        return call_tiles(1, self.heads, self.seqlen, self.seqlen)

    def __str__(self) -> str:
        return (f"{self.heads} heads x {self.seqlen} tokens x {self.head_dim}, "
                f"{str(self.dtype).removeprefix('torch.')}, {self.precision}, on {self.device}")


@dataclass(frozen=True)
class BreakEven:
    """Share of active tiles (0..1) above which the previous attention is faster.

    Attributes:
        source: "table" or "measured".
        dense_seconds, ours_seconds: per batch row with every tile active; None unless both were timed.
    """

    density: float
    source: str = "table"
    dense_seconds: float | None = None
    ours_seconds: float | None = None

    @classmethod
    def timed(cls, dense_seconds: float, ours_seconds: float) -> BreakEven:
        """The ratio of both sides' times, in the place of the table's estimate.

        Raises:
            ValueError: a time that is no positive number; no clock gives that, but drivers do.
        """
        for name, value in ((DENSE, dense_seconds), (OURS, ours_seconds)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} took {value} s; a call takes a positive number of seconds")
        steps = round(MARGIN * dense_seconds / ours_seconds / QUANTUM)
        return cls(min(1.0, max(DENSITY_MIN, round(steps * QUANTUM, 2))), "measured", dense_seconds, ours_seconds)


class Stopwatch(Protocol):
    """Started when it is made."""

    def stop(self) -> None:
        """The call is over (on a GPU: submitted)."""

    def seconds(self) -> float | None:
        """Time between the two, or None while the device has not got there. Never waits."""


class CudaStopwatch:
    """Two events on the device's current stream, around a call."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._events[0].record(self._stream)

    def stop(self) -> None:
        self._events[1].record(self._stream)

    def seconds(self) -> float | None:
        start, end = self._events
        return start.elapsed_time(end) / 1000 if end.query() else None


def start_stopwatch(device: torch.device) -> Stopwatch | None:
    """None on devices without events that tell the time."""
    return CudaStopwatch(device) if device.type == "cuda" else None


@dataclass
class _Side:
    """Samples of one attention, in the order of the calls: those still out, and seconds per batch row."""

    out: deque[tuple[Stopwatch, int]] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.out) + len(self.seconds) > SAMPLES

    def collect(self) -> None:
        while self.out:
            watch, rows = self.out[0]
            seconds = watch.seconds()
            if seconds is None:
                return
            self.out.popleft()
            self.seconds.append(seconds / rows)


class BreakEvens:
    """Break-even densities by shape, for one previous attention. Outlives runs: what the first run of a patched model
    has measured stays, so that the next one decides the same way. Locked, because several devices report at once.

    Args:
        table: (device, head_dim, dtype) -> density where nothing is measured. 1 stands for "ours is always faster".
        stopwatch: starts to time a call on a device; None where that cannot be done.
    """

    def __init__(self, table: Callable[[torch.device, int, torch.dtype], float] = break_even_density,
                 stopwatch: Callable[[torch.device], Stopwatch | None] = start_stopwatch):
        self._table = table
        self._stopwatch = stopwatch
        self._settled: dict[CallShape, BreakEven] = {}
        self._sides: dict[CallShape, dict[str, _Side]] = {}
        self._untimed: set[CallShape] = set()
        self._lock = threading.Lock()

    def of(self, shape: CallShape) -> BreakEven:
        """The break-even of a shape, as far as it is known."""
        return self._settled.get(shape) or BreakEven(self._table(shape.device, shape.head_dim, shape.dtype))

    def start(self, shape: CallShape, side: str) -> Stopwatch | None:
        """A running stopwatch if a sample of this side ("dense" or "ours") is still wanted."""
        with self._lock:
            if shape in self._settled or shape in self._untimed:
                return None
            if self._sides.setdefault(shape, {DENSE: _Side(), OURS: _Side()})[side].full:
                return None
        return self._stopwatch(shape.device)

    def stop(self, shape: CallShape, side: str, rows: int, watch: Stopwatch) -> None:
        """A timed call over `rows` batch rows, all tiles of them, is over."""
        watch.stop()
        with self._lock:
            if shape in self._sides:
                self._sides[shape][side].out.append((watch, rows))

    def collect(self) -> list[tuple[CallShape, Exception]]:
        """Read what has arrived and settle the shapes that have enough of both sides; never waits.

        Returns:
            Shapes that could not be read, with the error. They keep the table's value and are not timed again.
        """
        trouble = []
        with self._lock:
            for shape, sides in list(self._sides.items()):
                try:
                    for side in sides.values():
                        side.collect()
                    if all(len(side.seconds) > SAMPLES for side in sides.values()):
                        self._settled[shape] = BreakEven.timed(
                            *(statistics.median(sides[name].seconds[1:]) for name in (DENSE, OURS)))
                        del self._sides[shape]
                except Exception as error:
                    trouble.append((shape, error))
        for shape, _ in trouble:
            self.give_up(shape)
        return trouble

    def give_up(self, shape: CallShape) -> None:
        """Time no more calls of this shape; its break-even stays what the table says."""
        with self._lock:
            self._untimed.add(shape)
            self._sides.pop(shape, None)


class Dispatcher:
    """One run's choice between ours and the previous attention, layer by layer.

    Decisions change between steps only, so they depend on neither the order of the calls nor when a timing arrives
    within a step. All conditionings of a layer share them: a probe that takes turns with the evaluations of a step
    would always meet the same one.

    Args:
        break_evens: None leaves every call to us and times nothing.
        note: takes a sentence for the user, once per run.
    """

    def __init__(self, break_evens: BreakEvens | None, note: Callable[[str], None]):
        self._break_evens = break_evens
        self._note = note
        self._shapes: dict[CallShape, None] = {}
        self._samples: Counter[tuple[CallShape, str]] = Counter()
        self._dense_steps: dict[Hashable, int] = {}
        self._step: dict[Hashable, bool] = {}

    @property
    def enabled(self) -> bool:
        """Whether there is anything to choose."""
        return self._break_evens is not None

    @contextmanager
    def timed(self, shape: CallShape | None, side: str, rows: int) -> Iterator[bool]:
        """Time the enclosed call, which computes every tile, if a sample is wanted. A call that raises is no sample.

        Gives whether the call is one of those that a run may time. Those are the same in every run, also where nothing
        is left to time, so that what an earlier run has measured does not change what they compute.

        Args:
            shape: None for a call that is never timed.
        """
        break_evens = self._break_evens
        if break_evens is None or shape is None or self._samples[shape, side] > SAMPLES:
            yield False
            return
        self._samples[shape, side] += 1
        self._shapes[shape] = None
        watch = self._start(break_evens, shape, side)
        yield True
        self._stop(break_evens, shape, side, rows, watch)

    @contextmanager
    def sample(self, shape: CallShape | None, rows: int) -> Iterator[bool]:
        """Around a dense call that the run does not need: gives whether its time is wanted. A call that raises is no
        sample, and the last one of its shape."""
        break_evens, watch = self._break_evens, None
        if break_evens is not None and shape is not None and self._samples[shape, DENSE] <= SAMPLES:
            watch = self._start(break_evens, shape, DENSE)
        try:
            yield watch is not None
        except Exception as error:
            if break_evens is not None and shape is not None:
                self._untimed(break_evens, shape, error)
            return
        if watch is not None:
            self._samples[shape, DENSE] += 1
            self._shapes[shape] = None
            self._stop(break_evens, shape, DENSE, rows, watch)

    def _start(self, break_evens: BreakEvens, shape: CallShape, side: str) -> Stopwatch | None:
        try:
            return break_evens.start(shape, side)
        except Exception as error:
            self._untimed(break_evens, shape, error)
            return None

    def _stop(self, break_evens: BreakEvens, shape: CallShape, side: str, rows: int, watch: Stopwatch | None) -> None:
        if watch is not None:
            try:
                break_evens.stop(shape, side, rows, watch)
            except Exception as error:
                self._untimed(break_evens, shape, error)

    def prefers_previous(self, layer: Hashable, shape: CallShape | None, density: float | None) -> bool:
        """Whether the previous attention should compute this layer in this step.

        Args:
            shape: None where there is nothing to compare.
            density: active share of the layer's tiles when last seen, or None if it is not known.
        """
        if self._break_evens is None or shape is None or density is None:
            return False
        if layer not in self._step:
            self._shapes[shape] = None
            try:
                too_dense = density > self._break_evens.of(shape).density
            except Exception as error:
                self._give_up(error)
                return False
            self._step[layer] = too_dense and self._dense_steps.get(layer, 0) < PROBE_EVERY - 1
        return self._step[layer]

    def end_step(self) -> None:
        """Count the steps that layers were left, and take in the timings that have arrived."""
        if self._break_evens is None:
            return
        for layer, left in self._step.items():
            self._dense_steps[layer] = self._dense_steps.get(layer, 0) + 1 if left else 0
        self._step = {}
        try:
            for shape, error in self._break_evens.collect():
                self._untimed(self._break_evens, shape, error)
        except Exception as error:
            self._give_up(error)

    def tile_seconds(self) -> tuple[float, float] | None:
        """Seconds per tile of the previous attention and of ours, over the run's shapes that have been timed; None if
        none has."""
        if self._break_evens is None:
            return None
        try:
            timed = [(known.dense_seconds / tiles, known.ours_seconds / tiles)
                     for known, tiles in ((self._break_evens.of(shape), shape.tiles) for shape in self._shapes)
                     if known.dense_seconds is not None and known.ours_seconds is not None]
        except Exception as error:
            self._give_up(error)
            return None
        return tuple(statistics.fmean(side) for side in zip(*timed, strict=True)) if timed else None

    def break_even(self) -> float:
        """Mean break-even density of the run's shapes; 1 where there is nothing to choose."""
        if self._break_evens is None or not self._shapes:
            return 1.0
        try:
            return statistics.fmean(self._break_evens.of(shape).density for shape in self._shapes)
        except Exception as error:
            self._give_up(error)
            return 1.0

    def report(self) -> list[dict]:
        """The break-evens that this run used, as plain values: shape, density, source, seconds."""
        if self._break_evens is None:
            return []
        try:
            return [{"shape": str(shape), **asdict(self._break_evens.of(shape))} for shape in self._shapes]
        except Exception as error:
            self._give_up(error)
            return []

    def _untimed(self, break_evens: BreakEvens, shape: CallShape, error: Exception) -> None:
        break_evens.give_up(shape)
        self._note("attention cannot be timed here; a built-in value decides where dense attention is faster. "
                   f"{type(error).__name__}: {str(error)[:200]}")

    def _give_up(self, error: Exception) -> None:
        self._break_evens = None
        self._note("which attention is faster cannot be told; never_slower is off for the rest of this run. "
                   f"{type(error).__name__}: {str(error)[:200]}")
