"""Times of several functions that take turns, so that clocks, caches and heat are the same for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SPIN_CYCLES = 1_000_000
"""GPU cycles of idle work ahead of each round, about 0.6 ms: Python gets ahead of the GPU, so that no launch of the
round waits for it. Python's own cost per call is another matter, which `benchmarks/launch.py` measures."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one function over all rounds: median, lower and upper quartile."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """Raises:
            ValueError: no value.
        """
        if not milliseconds:
            raise ValueError("no round was timed")
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        q1, median, q3 = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(median, q1, q3, len(milliseconds))


class Stopwatch:
    """Marks moments on a device: CUDA events there, the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> object:
        """The moment at which everything queued so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: object, end: object) -> float:
        """Between two marks; waits for the second."""
        if not self.cuda:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)

    def settle(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], object]], device: torch.device, *, seconds: float,
                min_rounds: int = 5, max_rounds: int = 50, deadline: float = float("inf"),
                ) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time every function once per round, A B C … A B C …, after one round that does not count.

    Args:
        seconds: aim for the rounds together; `min_rounds` are made even if they take longer, `max_rounds` at most.
        deadline: on `time.monotonic()`; no further round starts after it (one is always made).

    Returns:
        times by name, and for each function that raised what it said; it takes no further part.
    """
    watch = Stopwatch(device)
    functions, failed = dict(functions), {}
    times: dict[str, list[float]] = {name: [] for name in functions}
    done, rounds_wanted = 0, min_rounds
    while done <= rounds_wanted:
        if watch.cuda:
            torch.cuda._sleep(SPIN_CYCLES)
        marks, started = {}, time.monotonic()
        for name, function in list(functions.items()):
            begin = watch.mark()
            try:
                function()
            except Exception as error:  # one contender's fault must not cost the others their times
                failed[name] = f"{type(error).__name__}: {error}"
                del functions[name]
                continue
            marks[name] = (begin, watch.mark())
        watch.settle()
        took = time.monotonic() - started
        if done:
            for name, (begin, end) in marks.items():
                times[name].append(watch.milliseconds(begin, end))
        else:
            rounds_wanted = min(max_rounds, max(min_rounds, round(seconds / max(took, 1e-6))))
        done += 1
        if done > 1 and time.monotonic() > deadline:
            break
    return {name: Timing.of(values) for name, values in times.items() if values and name not in failed}, failed
