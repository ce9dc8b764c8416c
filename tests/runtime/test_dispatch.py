"""Where dense attention is faster: from a table, from a stopwatch, and what a run makes of it."""

import json
import math
import threading

import pytest
import torch

from liteattention.runtime import BreakEvens
from liteattention.runtime.dispatch import (
    DENSE,
    DENSITY_MIN,
    MARGIN,
    OURS,
    PROBE_EVERY,
    SAMPLES,
    BreakEven,
    CallShape,
    Dispatcher,
    start_stopwatch,
)

CPU = torch.device("cpu")
SHAPE = CallShape(CPU, 12, 32760, 128, torch.bfloat16, "full")
OTHERS = [SHAPE._replace(seqlen=75600), SHAPE._replace(precision="int8"), SHAPE._replace(device=torch.device("meta"))]


class Clock:
    """Stopwatches that say what they are told, once the device has got there."""

    def __init__(self):
        self.takes, self.arrived, self.started = 1.0, True, []

    def __call__(self, device):
        self.started.append(device)
        return Watch(self, self.takes)


class Watch:
    def __init__(self, clock, takes):
        self.clock, self.takes, self.stopped = clock, takes, False

    def stop(self):
        self.stopped = True

    def seconds(self):
        assert self.stopped
        if isinstance(self.takes, Exception):
            raise self.takes
        return self.takes if self.clock.arrived else None


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def known(clock):
    """Break-evens over a table that says 0.8."""
    return BreakEvens(lambda device, head_dim, dtype: 0.8, clock)


def sample(known, clock, side, times, shape=SHAPE, rows=1):
    """As many samples as are wanted of these; how many were."""
    wanted = 0
    for clock.takes in times:
        watch = known.start(shape, side)
        if watch is not None:
            known.stop(shape, side, rows, watch)
            wanted += 1
    return wanted


def both(known, clock, dense, ours, shape=SHAPE):
    for side, seconds in ((DENSE, dense), (OURS, ours)):
        sample(known, clock, side, [seconds] * (SAMPLES + 1), shape)


def test_the_table_decides_until_both_sides_are_timed(known, clock):
    assert known.of(SHAPE) == BreakEven(0.8)
    assert sample(known, clock, DENSE, [9.0, 1.0, 1.1, 0.9, 7.0]) == SAMPLES + 1, "no more than it takes"
    assert known.collect() == [] and known.of(SHAPE) == BreakEven(0.8)
    sample(known, clock, OURS, [50.0, 2.0, 1.0, 2.0])
    assert known.of(SHAPE) == BreakEven(0.8), "settled between steps only"
    known.collect()
    found = known.of(SHAPE)
    assert (found.dense_seconds, found.ours_seconds) == (1.0, 2.0), "the median of all but the first"
    assert found.source == "measured" and found.density == pytest.approx(MARGIN / 2, abs=0.026)
    assert sample(known, clock, DENSE, [1.0]) == sample(known, clock, OURS, [1.0]) == 0, "settled for good"
    assert all(known.of(shape) == BreakEven(0.8) for shape in OTHERS)


def test_nothing_waits_for_the_device(known, clock):
    clock.arrived = False
    both(known, clock, 1.0, 2.0)
    assert known.collect() == [] and known.of(SHAPE).source == "table"
    clock.arrived = True
    known.collect()
    assert known.of(SHAPE).source == "measured"


def test_a_batch_row_is_what_is_compared(known, clock):
    sample(known, clock, DENSE, [3.0] * 4, rows=3)
    sample(known, clock, OURS, [2.0] * 4, rows=1)
    known.collect()
    assert (known.of(SHAPE).dense_seconds, known.of(SHAPE).ours_seconds) == (1.0, 2.0)


@pytest.mark.parametrize("dense, ours, density", [
    (1.0, 2.0, 0.5),
    (1.0, 2.04, 0.5),
    (1.0, 1.4, 0.7),
    (1.0, 1.0, 0.95),
    (9.0, 1.0, 1.0),
    (1.0, 900.0, DENSITY_MIN),
])
def test_a_measurement_counts_in_steps(dense, ours, density):
    found = BreakEven.timed(dense, ours)
    assert (found.density, found.source) == (density, "measured")
    assert (found.dense_seconds, found.ours_seconds) == (dense, ours)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, OSError("event was lost")])
@pytest.mark.parametrize("side", [DENSE, OURS])
def test_a_clock_that_fails_leaves_the_table_and_is_not_asked_again(known, clock, value, side):
    sides = {DENSE: 1.0, OURS: 1.0, side: value}
    both(known, clock, sides[DENSE], sides[OURS])
    both(known, clock, 1.0, 2.0, OTHERS[0])
    (shape, error), = known.collect()
    assert shape == SHAPE and isinstance(error, OSError if isinstance(value, OSError) else ValueError)
    assert known.of(SHAPE) == BreakEven(0.8) and known.of(OTHERS[0]).source == "measured"
    assert known.start(SHAPE, DENSE) is None and known.collect() == []


def test_every_shape_and_device_has_its_own(known, clock):
    for i, shape in enumerate([SHAPE, *OTHERS]):
        both(known, clock, 1.0, 2.0 + i, shape)
    known.collect()
    densities = [known.of(shape).density for shape in [SHAPE, *OTHERS]]
    assert densities == sorted(set(densities), reverse=True)
    assert set(clock.started) == {CPU, torch.device("meta")}


def test_threads_of_several_devices_share_it(known, clock):
    clock.takes = 1.0
    shapes = [SHAPE._replace(heads=i) for i in range(1, 9)]

    def work(shape):
        for _ in range(50):
            for side in (DENSE, OURS):
                watch = known.start(shape, side)
                if watch is not None:
                    known.stop(shape, side, 1, watch)
            known.collect()

    threads = [threading.Thread(target=work, args=[shape]) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(known.of(shape).ours_seconds == 1.0 for shape in shapes)
    assert len(clock.started) == len(shapes) * 2 * (SAMPLES + 1)


def test_a_cpu_is_never_timed_and_never_left():
    known = BreakEvens()
    assert start_stopwatch(CPU) is None and known.start(SHAPE, DENSE) is None
    assert known.of(SHAPE) == BreakEven(1.0)
    assert not Dispatcher(known, pytest.fail).prefers_previous("layer", SHAPE, 1.0)


def test_a_gpu_is_asked_and_not_waited_for(monkeypatch):
    log = []

    class Event:
        done = False

        def __init__(self, enable_timing):
            assert enable_timing
            log.append(self)

        def record(self, stream):
            log.append((log.index(self), stream))

        def query(self):
            return Event.done

        def elapsed_time(self, end):
            assert (log.index(self), log.index(end)) == (0, 1) and Event.done
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", pytest.fail)
    watch = start_stopwatch(torch.device("cuda", 1))
    assert log[2:] == [(0, "stream of cuda:1")]
    watch.stop()
    assert log[3:] == [(1, "stream of cuda:1")] and watch.seconds() is None
    Event.done = True
    assert watch.seconds() == 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed():
    device = torch.device("cuda", torch.cuda.current_device())
    known, shape = BreakEvens(), SHAPE._replace(device=device)
    dispatcher = Dispatcher(known, pytest.fail)
    x = torch.randn(2048, 2048, device=device)
    for side in (DENSE, OURS):
        for _ in range(SAMPLES + 1):
            with dispatcher.timed(shape, side, 2):
                x = (x @ x).tanh()
    torch.cuda.synchronize()
    dispatcher.end_step()
    assert known.of(shape).dense_seconds > 0 and known.of(shape).ours_seconds > 0


def steps(dispatcher, density, count, layer="layer"):
    """In which of `count` steps the previous attention is preferred."""
    answers = []
    for _ in range(count):
        answers.append(dispatcher.prefers_previous(layer, SHAPE, density))
        dispatcher.end_step()
    return answers


def test_a_dense_layer_is_left_and_tried_again_every_fourth_step(known):
    dispatcher = Dispatcher(known, pytest.fail)
    assert PROBE_EVERY == 4
    assert steps(dispatcher, 0.9, 9) == [True, True, True, False] * 2 + [True]
    assert steps(dispatcher, 0.8, 2, "at the break-even") == [False, False]
    assert steps(dispatcher, None, 2, "not seen yet") == [False, False]


def test_one_answer_per_layer_and_step(known):
    dispatcher = Dispatcher(known, pytest.fail)
    assert dispatcher.prefers_previous("a", SHAPE, 0.9) and not dispatcher.prefers_previous("b", SHAPE, 0.1)
    assert dispatcher.prefers_previous("a", SHAPE, 0.1) and not dispatcher.prefers_previous("b", SHAPE, 0.9)
    dispatcher.end_step()
    assert not dispatcher.prefers_previous("a", SHAPE, 0.1) and dispatcher.prefers_previous("b", SHAPE, 0.9)


def test_switched_off_it_leaves_nothing_and_times_nothing(clock):
    dispatcher = Dispatcher(None, pytest.fail)
    assert not dispatcher.enabled and not dispatcher.prefers_previous("a", SHAPE, 1.0)
    with dispatcher.timed(SHAPE, OURS, 1) as timed:
        assert not timed
    dispatcher.end_step()
    assert dispatcher.report() == []


def test_the_calls_that_may_be_timed_are_the_same_in_every_run(known, clock):
    """They compute what others leave out, so a second run has to give what the first one gave."""
    answers = []
    for _ in range(2):
        dispatcher = Dispatcher(known, pytest.fail)
        for side in (DENSE, OURS):
            for _ in range(SAMPLES + 3):
                with dispatcher.timed(SHAPE, side, 1) as timed:
                    answers.append(timed)
        with dispatcher.timed(None, OURS, 1) as timed:
            assert not timed
        dispatcher.end_step()
    assert answers == ([True] * (SAMPLES + 1) + [False] * 2) * 4
    assert len(clock.started) == 2 * (SAMPLES + 1), "the second run had nothing left to time"


def test_a_call_that_raises_is_no_sample_and_raises(known, clock):
    dispatcher = Dispatcher(known, pytest.fail)
    with pytest.raises(KeyError), dispatcher.timed(SHAPE, DENSE, 1):
        clock.takes = 99.0
        raise KeyError
    clock.takes = 1.0
    both(known, clock, 1.0, 2.0)
    dispatcher.end_step()
    assert known.of(SHAPE).dense_seconds == 1.0


def failing(*args):
    raise OSError("no such event")


def unstoppable(device):
    watch = Watch(None, 1.0)
    watch.stop = failing
    return watch


@pytest.mark.parametrize("stopwatch", [failing, unstoppable, lambda device: Watch(Clock(), OSError("no such event"))])
def test_timing_that_fails_is_one_note_and_no_error(stopwatch):
    notes = []
    dispatcher = Dispatcher(BreakEvens(lambda *args: 0.8, stopwatch), notes.append)
    for _ in range(3):
        with dispatcher.timed(SHAPE, DENSE, 1):
            pass
        dispatcher.end_step()
    assert len(notes) == 1 and "cannot be timed" in notes[0] and "OSError: no such event" in notes[0]
    assert steps(dispatcher, 0.9, 1) == [True], "the table still decides"


def test_a_table_that_fails_switches_off_with_one_note():
    notes = []
    dispatcher = Dispatcher(BreakEvens(failing), notes.append)
    assert steps(dispatcher, 0.9, 3) == [False] * 3 and dispatcher.report() == []
    assert len(notes) == 1 and "never_slower is off" in notes[0]


def test_a_report_that_fails_is_empty():
    notes = []
    dispatcher = Dispatcher(BreakEvens(failing, Clock()), notes.append)
    with dispatcher.timed(SHAPE, DENSE, 1):
        pass
    assert dispatcher.report() == [] and len(notes) == 1


def test_the_report_is_plain_and_names_what_was_used(known, clock):
    dispatcher = Dispatcher(known, pytest.fail)
    both(known, clock, 1.0, 2.0, OTHERS[0])
    dispatcher.end_step()
    dispatcher.prefers_previous("layer", SHAPE, 0.9)
    entry, = json.loads(json.dumps(dispatcher.report()))
    assert entry == {"shape": "12 heads x 32760 tokens x 128, bfloat16, full, on cpu", "density": 0.8,
                     "source": "table", "dense_seconds": None, "ours_seconds": None}
