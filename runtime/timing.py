"""Which attention is faster for a layer, and how much time a run has saved: from calls that run anyway.

On a GPU a few calls of either kind are timed between events that are polled and never waited for: dense calls of the
warm-up, and sparse calls that compute every tile. Their ratio takes the place of the kernels' table of break-even
densities. Where the only warm-up step records, one layer in a few stays dense in it and records a step later. On a CPU
every call is timed by the clock, and none is sent to the fallback attention.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..kernels import break_even_density, call_tiles
from .counters import Counters
from .masks import LayerKey

MARGIN = 0.97
"""Below 1, because the time of the sparse kernel falls a little less than its share of tiles."""
QUANTUM = 0.05
"""Steps of a measured break-even, so that the noise of a timer rarely decides for another attention."""
DENSITY_MIN = 0.05
SAMPLES = 3
"""Calls that count on either side; one more before them compiles, plans and warms up, and is thrown away."""
DENSE_LAYER_EVERY = 4
"""One layer in so many gives its recording call to a dense sample that is missing."""
DENSE, SPARSE = "dense", "sparse"


class CallShape(NamedTuple):
    """What the break-even depends on. `precision`: "full" or "int8", as the sparse kernel computes the call.
    `dense_by`: display name of the attention that computes dense ones."""

    device: torch.device
    heads: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype
    precision: str
    dense_by: str = ""

    @property
    def tiles(self) -> int:
        """Of one batch entry."""
        return call_tiles(1, self.heads, self.seqlen, self.seqlen)

    def __str__(self) -> str:
        return (f"{self.heads} heads x {self.seqlen} tokens x {self.head_dim}, "
                f"{str(self.dtype).removeprefix('torch.')}, {self.precision}, on {self.device}"
                + (f", against {self.dense_by}" if self.dense_by else ""))


@dataclass(frozen=True)
class BreakEven:
    """Share of active tiles (0..1) above which the fallback attention is faster.

    Attributes:
        source: "table" or "measured".
        dense_seconds, sparse_seconds: per batch entry with every tile active; None unless both were timed.
    """

    density: float
    source: str = "table"
    dense_seconds: float | None = None
    sparse_seconds: float | None = None

    @classmethod
    def timed(cls, dense_seconds: float, sparse_seconds: float) -> BreakEven:
        """The ratio of both sides' times, in the place of the table's estimate.

        Raises:
            ValueError: a time that is no positive number; no clock gives that, but drivers do.
        """
        for name, value in ((DENSE, dense_seconds), (SPARSE, sparse_seconds)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a {name} call took {value} s; it takes a positive number of seconds")
        steps = round(MARGIN * dense_seconds / sparse_seconds / QUANTUM)
        return cls(min(1.0, max(DENSITY_MIN, round(steps * QUANTUM, 2))), "measured", dense_seconds, sparse_seconds)


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
    """Samples of one attention, in the order of the calls: those that are pending, and seconds per batch entry."""

    pending: deque[tuple[Stopwatch, int]] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.pending) + len(self.seconds) > SAMPLES

    def collect(self) -> None:
        while self.pending:
            watch, batch = self.pending[0]
            seconds = watch.seconds()
            if seconds is None:
                return
            self.pending.popleft()
            self.seconds.append(seconds / batch)


class BreakEvens:
    """Break-even densities by shape, for one fallback attention. Outlives runs: what the first run of a patched model
    has measured stays, so that the next one decides the same way. Locked, because several devices report at once.

    Args:
        table: (device, head_dim, dtype) -> density where nothing is measured. 1 stands for "sparse is always faster".
        stopwatch: starts to time a call on a device; None where that cannot be done.
    """

    def __init__(self, table: Callable[[torch.device, int, torch.dtype], float] = break_even_density,
                 stopwatch: Callable[[torch.device], Stopwatch | None] = start_stopwatch):
        self._table = table
        self._stopwatch = stopwatch
        self._settled: dict[CallShape, BreakEven] = {}
        self._sides: dict[CallShape, dict[str, _Side]] = {}
        self._lock = threading.Lock()

    def of(self, shape: CallShape) -> BreakEven:
        """The break-even of a shape, as far as it is known."""
        return self._settled.get(shape) or BreakEven(self._table(shape.device, shape.head_dim, shape.dtype))

    def wants(self, shape: CallShape, side: str) -> bool:
        """Whether a sample of this side ("dense" or "sparse") is missing."""
        with self._lock:
            return self._wants(shape, side)

    def _wants(self, shape: CallShape, side: str) -> bool:
        return shape not in self._settled and not (shape in self._sides and self._sides[shape][side].full)

    def start(self, shape: CallShape, side: str) -> Stopwatch | None:
        """A running stopwatch if a sample of this side is missing."""
        with self._lock:
            if not self._wants(shape, side):
                return None
            self._sides.setdefault(shape, {DENSE: _Side(), SPARSE: _Side()})
        return self._stopwatch(shape.device)

    def stop(self, shape: CallShape, side: str, batch: int, watch: Stopwatch) -> None:
        """A timed call over `batch` batch entries, all tiles of them, is over."""
        watch.stop()
        with self._lock:
            if shape in self._sides:
                self._sides[shape][side].pending.append((watch, batch))

    def collect(self) -> None:
        """Read the samples that have arrived and settle the shapes that have enough of both sides; never waits.

        Raises:
            Exception: of a clock, once every shape is read. Its shape keeps the table's value and is not timed again.
        """
        failed = None
        with self._lock:
            for shape, sides in list(self._sides.items()):
                try:
                    found = _measured(sides)
                except Exception as error:
                    failed, found = failed or error, self.of(shape)
                if found is not None:
                    del self._sides[shape]
                    self._settled[shape] = found
        if failed is not None:
            raise failed


def _measured(sides: Mapping[str, _Side]) -> BreakEven | None:
    for side in sides.values():
        side.collect()
    if not all(len(side.seconds) > SAMPLES for side in sides.values()):
        return None
    return BreakEven.timed(*(statistics.median(sides[name].seconds[1:]) for name in (DENSE, SPARSE)))


@dataclass(frozen=True)
class TimeSaved:
    """Time of self-attention over the video's tokens, if all of it were dense and as the run was.

    Attributes:
        source: "timed calls" (a few of each attention, between events) or "the clock" (every call of the run).
    """

    dense_seconds: float
    sparse_seconds: float
    source: str

    @property
    def share(self) -> float:
        """Of `dense_seconds`; below 0 where the run was slower."""
        return 1 - self.sparse_seconds / self.dense_seconds


class Sample:
    """A call that is being timed."""

    counts = True

    def discard(self) -> None:
        """The call did not run."""
        self.counts = False


class AttentionTimes:
    """One run's choice between sparse and fallback attention, layer by layer, and the time it has saved.

    Every layer is sparse in the first steps that may skip; then it is chosen once for the rest of the run. So the order
    of allocations changes once: ComfyUI may record and replay it. It does not depend on when within a step a timing
    arrives.
    A clock that fails costs the figures and the choice, never the run.

    Args:
        break_evens: shared by the runs with the same fallback attention.
        note: takes a sentence for the user.
        trial_steps: steps with a known density before the choice.
    """

    def __init__(self, break_evens: BreakEvens, note: Callable[[str], None], trial_steps: int = 1):
        self._break_evens = break_evens
        self._note = note
        self._trial_steps = trial_steps
        self._shapes: dict[LayerKey, CallShape] = {}
        self._samples: Counter[tuple[CallShape, str]] = Counter()
        self._too_dense: frozenset[LayerKey] = frozenset()
        self._clock = {DENSE: 0.0, SPARSE: 0.0}

    def dense_faster(self, layer: LayerKey) -> bool:
        """Whether the fallback attention should compute this layer in this step."""
        return layer in self._too_dense

    def wants_dense(self, shape: CallShape | None, block: int) -> bool:
        """Whether block number `block` should give its recording call to the fallback attention, whose time is missing.
        """
        return (shape is not None and shape.device.type != "cpu" and block % DENSE_LAYER_EVERY == DENSE_LAYER_EVERY - 1
                and self._samples[shape, DENSE] <= SAMPLES
                and bool(self._guarded(lambda known: known.wants(shape, DENSE))))

    @contextmanager
    def timed(self, shape: CallShape | None, side: str, batch: int, every_tile: bool) -> Iterator[Sample]:
        """Time the enclosed call. A call that raises, or discards its sample, is not counted.

        Args:
            shape: None for a call that is not timed.
            every_tile: whether it can be compared with a dense call.
        """
        sample, watch, started = Sample(), None, time.perf_counter()
        on_cpu = shape is not None and shape.device.type == "cpu"
        if shape is not None and not on_cpu and every_tile and self._samples[shape, side] <= SAMPLES:
            self._samples[shape, side] += 1
            watch = self._guarded(lambda known: known.start(shape, side))
        yield sample
        if sample.counts and on_cpu:
            self._clock[side] += time.perf_counter() - started
        elif sample.counts and watch is not None:
            self._guarded(lambda known: known.stop(shape, side, batch, watch))

    def add_sparse(self, layer: LayerKey, shape: CallShape | None) -> None:
        """A sparse call of a layer has run."""
        if shape is not None:
            self._shapes[layer] = shape

    def end_step(self, densities: Mapping[LayerKey, float]) -> None:
        """Take in the timings that have arrived and, after the last trial step, choose for the rest of the run.

        Args:
            densities: active share of each layer's tiles when last seen.
        """
        self._guarded(lambda known: known.collect())
        self._trial_steps -= bool(densities)
        if self._trial_steps == 0 and densities:
            self._too_dense = self._guarded(lambda known: frozenset(
                layer for layer, shape in self._shapes.items()
                if densities.get(layer, 0.0) > known.of(shape).density)) or frozenset()

    def saved(self, counters: Counters) -> TimeSaved | None:
        """What the closed steps have saved, or None where that was not timed. No synchronisation."""
        total, sparse = counters.tiles_total, counters.sparse_total
        dense_clock, sparse_clock = self._clock[DENSE], self._clock[SPARSE]
        if counters.dense_tiles and dense_clock > 0 and sparse_clock > 0:
            return TimeSaved(dense_clock / counters.dense_tiles * total, dense_clock + sparse_clock, "the clock")
        timed = [(known.dense_seconds / shape.tiles, known.sparse_seconds / shape.tiles)
                 for shape, known in self._known().items()
                 if known.dense_seconds is not None and known.sparse_seconds is not None]
        if not timed or not total:
            return None
        dense_tile, sparse_tile = (statistics.fmean(side) for side in zip(*timed, strict=True))
        return TimeSaved(dense_tile * total, dense_tile * (total - sparse) + sparse_tile * counters.sparse_computed,
                         "timed calls")

    def report(self) -> list[dict]:
        """The break-evens that this run used, as plain values: shape, density, source, seconds."""
        return [{"shape": str(shape), **asdict(known)} for shape, known in self._known().items()]

    def _known(self) -> dict[CallShape, BreakEven]:
        shapes = dict.fromkeys(self._shapes.values())
        return self._guarded(lambda known: {shape: known.of(shape) for shape in shapes}) or {}

    def _guarded(self, action: Callable[[BreakEvens], object]) -> object:
        """What `action` gives, or None if it fails. After a failure nothing is timed, and the table decides."""
        try:
            return action(self._break_evens)
        except Exception as error:
            self._break_evens = BreakEvens(stopwatch=lambda device: None)
            self._note("attention cannot be timed here; a built-in value decides where dense attention is faster. "
                       f"{type(error).__name__}: {str(error)[:200]}")
            return None
