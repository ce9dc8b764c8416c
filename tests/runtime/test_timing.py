"""Where dense attention is faster: from a table, from timed calls, and what a run makes of it."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from run_kit import TILES, Fallback, dense, forward, in_threads, masks, passes, play, sampling_run, tokens

from liteattention.kernels import SkipMask
from liteattention.runtime import BreakEvens, LayerId
from liteattention.runtime.masks import LayerKey
from liteattention.runtime.reasons import DENSE_FASTER, KERNEL_FAILED
from liteattention.runtime.timing import (
    DENSE,
    DENSITY_MIN,
    MARGIN,
    SAMPLES,
    SPARSE,
    AttentionTimes,
    BreakEven,
    CallShape,
    start_stopwatch,
)

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = CallShape(META, 12, 32760, 128, torch.bfloat16, "full")
"""On a device that is no CPU, where calls are timed by stopwatches."""
OTHERS = [SHAPE._replace(seqlen=75600), SHAPE._replace(precision="int8"), SHAPE._replace(device=CPU)]
LAYER = LayerKey("m", META, "double 0")


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


@pytest.fixture
def times(known):
    return AttentionTimes(known, pytest.fail)


def above(density):
    """Break-evens that nothing is timed for."""
    return BreakEvens(lambda *args: density, lambda device: None)


def sample(known, clock, side, times, shape=SHAPE, batch=1):
    """As many samples as are wanted of these; how many were."""
    wanted = 0
    for clock.takes in times:
        watch = known.start(shape, side)
        if watch is not None:
            known.stop(shape, side, batch, watch)
            wanted += 1
    return wanted


def both(known, clock, dense, sparse, shape=SHAPE):
    for side, seconds in ((DENSE, dense), (SPARSE, sparse)):
        sample(known, clock, side, [seconds] * (SAMPLES + 1), shape)


def test_the_table_decides_until_both_sides_are_timed(known, clock):
    assert known.of(SHAPE) == BreakEven(0.8)
    assert sample(known, clock, DENSE, [9.0, 1.0, 1.1, 0.9, 7.0]) == SAMPLES + 1, "no more than it takes"
    known.collect()
    assert known.of(SHAPE) == BreakEven(0.8)
    sample(known, clock, SPARSE, [50.0, 2.0, 1.0, 2.0])
    assert known.of(SHAPE) == BreakEven(0.8), "settled between steps only"
    known.collect()
    found = known.of(SHAPE)
    assert (found.dense_seconds, found.sparse_seconds) == (1.0, 2.0), "the median of all but the first"
    assert found.source == "measured" and found.density == pytest.approx(MARGIN / 2, abs=0.026)
    assert sample(known, clock, DENSE, [1.0]) == sample(known, clock, SPARSE, [1.0]) == 0, "settled for good"
    assert all(known.of(shape) == BreakEven(0.8) for shape in OTHERS)


def test_nothing_waits_for_the_device(known, clock):
    clock.arrived = False
    both(known, clock, 1.0, 2.0)
    known.collect()
    assert known.of(SHAPE).source == "table"
    clock.arrived = True
    known.collect()
    assert known.of(SHAPE).source == "measured"


def test_a_batch_entry_is_what_is_compared(known, clock):
    sample(known, clock, DENSE, [3.0] * 4, batch=3)
    sample(known, clock, SPARSE, [2.0] * 4, batch=1)
    known.collect()
    assert (known.of(SHAPE).dense_seconds, known.of(SHAPE).sparse_seconds) == (1.0, 2.0)


@pytest.mark.parametrize("dense, sparse, density", [
    (1.0, 2.0, 0.5),
    (1.0, 2.04, 0.5),
    (1.0, 1.4, 0.7),
    (1.0, 1.0, 0.95),
    (9.0, 1.0, 1.0),
    (1.0, 900.0, DENSITY_MIN),
])
def test_a_measurement_counts_in_steps(dense, sparse, density):
    assert BreakEven.timed(dense, sparse) == BreakEven(density, "measured", dense, sparse)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, OSError("event was lost")])
@pytest.mark.parametrize("side", [DENSE, SPARSE])
def test_a_clock_that_fails_leaves_the_table_and_is_not_asked_again(known, clock, value, side):
    sides = {DENSE: 1.0, SPARSE: 1.0, side: value}
    both(known, clock, sides[DENSE], sides[SPARSE])
    both(known, clock, 1.0, 2.0, OTHERS[0])
    with pytest.raises(OSError if isinstance(value, OSError) else ValueError):
        known.collect()
    assert known.of(SHAPE) == BreakEven(0.8) and known.of(OTHERS[0]).source == "measured"
    known.collect()
    assert known.start(SHAPE, DENSE) is None


def test_threads_of_several_devices_share_it(known, clock):
    shapes = [SHAPE._replace(heads=i) for i in range(1, 9)]

    def work(shape):
        for _ in range(50):
            for side in (DENSE, SPARSE):
                watch = known.start(shape, side)
                if watch is not None:
                    known.stop(shape, side, 1, watch)
            known.collect()

    in_threads(work, shapes)
    assert all(known.of(shape).sparse_seconds == 1.0 for shape in shapes)
    assert len(clock.started) == len(shapes) * 2 * (SAMPLES + 1)


def test_a_cpu_has_no_stopwatch_and_no_call_that_dense_attention_wins():
    known, shape = BreakEvens(), SHAPE._replace(device=CPU)
    assert start_stopwatch(CPU) is None and known.start(shape, DENSE) is None
    assert known.of(shape) == BreakEven(1.0)


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
    times = AttentionTimes(known, pytest.fail)
    x = torch.randn(2048, 2048, device=device)
    for side in (DENSE, SPARSE):
        for _ in range(SAMPLES + 1):
            with times.timed(shape, side, 2, every_tile=True):
                x = (x @ x).tanh()
    torch.cuda.synchronize()
    times.end_step({})
    assert known.of(shape).dense_seconds > 0 and known.of(shape).sparse_seconds > 0


def time_calls(times, clock, dense=1.0, sparse=2.0, shape=SHAPE, count=SAMPLES + 1):
    for side, clock.takes in ((DENSE, dense), (SPARSE, sparse)):
        for _ in range(count):
            with times.timed(shape, side, 1, every_tile=True):
                pass


def test_a_few_calls_that_compute_every_tile_are_timed(times, known, clock):
    for side in (DENSE, SPARSE):
        with times.timed(SHAPE, side, 1, every_tile=False):
            pass
        with times.timed(None, side, 1, every_tile=True):
            pass
    assert not clock.started
    time_calls(times, clock, count=SAMPLES + 5)
    assert len(clock.started) == 2 * (SAMPLES + 1)
    times.end_step({})
    assert known.of(SHAPE).source == "measured"
    time_calls(AttentionTimes(known, pytest.fail), clock)
    assert len(clock.started) == 2 * (SAMPLES + 1), "a second run has nothing left to time"


def test_a_call_that_raises_or_did_not_run_is_no_sample(times, known, clock):
    clock.takes = 99.0
    with pytest.raises(KeyError), times.timed(SHAPE, DENSE, 1, every_tile=True):
        raise KeyError
    with times.timed(SHAPE, SPARSE, 1, every_tile=True) as discarded:
        discarded.discard()
    both(known, clock, 1.0, 2.0)
    times.end_step({})
    assert (known.of(SHAPE).dense_seconds, known.of(SHAPE).sparse_seconds) == (1.0, 2.0)


def steps(times, density, count):
    """In which of `count` steps a layer is found too dense, the first one counted from the end of the step before."""
    answers = []
    times.add_sparse(LAYER, SHAPE)
    for _ in range(count):
        times.end_step({} if density is None else {LAYER: density})
        answers.append(times.dense_faster(LAYER))
    return answers


@pytest.mark.parametrize("trial", [1, 3])
def test_a_layer_that_is_too_dense_after_the_trial_stays_dense(known, trial):
    for density, too_dense in ((0.9, True), (0.8, False), (None, False)):
        answers = steps(AttentionTimes(known, pytest.fail, trial), density, 6)
        assert answers == [False] * (trial - 1) + [too_dense] * (7 - trial)


def test_the_choice_is_each_layer_s_own_and_is_made_once(times, known, clock):
    both(known, clock, 1.0, 1.0, OTHERS[0])
    layers = [LayerKey("m", META, f"double {n}") for n in range(3)]
    for layer, shape in zip(layers, (SHAPE, SHAPE, OTHERS[0]), strict=True):
        times.add_sparse(layer, shape)
    times.end_step(dict(zip(layers, (0.9, 0.1, 0.9), strict=True)))
    assert [times.dense_faster(layer) for layer in layers] == [True, False, False]
    times.end_step(dict(zip(layers, (0.1, 0.9, 0.1), strict=True)))
    assert [times.dense_faster(layer) for layer in layers] == [True, False, False]


def failing(*args):
    raise OSError("no such event")


def unstoppable(device):
    return SimpleNamespace(stop=failing)


@pytest.mark.parametrize("known", [BreakEvens(stopwatch=failing), BreakEvens(stopwatch=unstoppable),
                                   BreakEvens(stopwatch=lambda device: Watch(Clock(), OSError("no such event"))),
                                   BreakEvens(failing, Clock())], ids=["start", "stop", "read", "table"])
def test_timing_that_fails_is_one_note_and_the_built_in_table_decides(known):
    notes = []
    times = AttentionTimes(known, notes.append)
    shape = SHAPE._replace(device=torch.device("xpu"))
    times.add_sparse(LAYER, shape)
    for _ in range(3):
        with times.timed(shape, DENSE, 1, every_tile=True):
            pass
        times.end_step({LAYER: 1.0})
    note, = notes
    assert "cannot be timed" in note and "OSError: no such event" in note
    density = BreakEvens().of(shape).density
    assert [(entry["density"], entry["source"]) for entry in times.report()] == [(density, "table")]


def counts(total=1000, sparse=800, computed=400):
    return SimpleNamespace(tiles_total=total, sparse_total=sparse, sparse_computed=computed, dense_tiles=total - sparse)


def test_the_time_saved_is_that_of_timed_calls_times_the_tiles(times, clock):
    times.add_sparse(LAYER, SHAPE)
    assert times.saved(counts()) is None
    time_calls(times, clock, dense=2.0 * SHAPE.tiles, sparse=3.0 * SHAPE.tiles)
    times.end_step({})
    saved = times.saved(counts())
    assert (saved.dense_seconds, saved.sparse_seconds) == (2000.0, 200 * 2.0 + 400 * 3.0)
    assert saved.source == "timed calls" and saved.share == pytest.approx(0.2)
    assert times.saved(counts(0, 0, 0)) is None


def test_on_a_cpu_every_call_counts_by_the_clock(times, monkeypatch):
    shape, now = SHAPE._replace(device=CPU), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(side, seconds, every_tile=False):
        with times.timed(shape, side, 1, every_tile):
            now[0] += seconds

    for _ in range(10):
        call(SPARSE, 1.0)
    assert times.saved(counts()) is None, "no dense call to compare with"
    call(DENSE, 5.0)
    with times.timed(shape, SPARSE, 1, True) as discarded:
        now[0] += 100.0
        discarded.discard()
    saved = times.saved(counts())
    assert (saved.dense_seconds, saved.sparse_seconds, saved.source) == (5.0 / 200 * 1000, 15.0, "the clock")


def test_the_report_is_plain_and_names_what_was_used(times, known, clock):
    both(known, clock, 1.0, 2.0, OTHERS[0])
    times.add_sparse(LAYER, SHAPE)
    entry, = json.loads(json.dumps(times.report()))
    assert entry == {"shape": "12 heads x 32760 tokens x 128, bfloat16, full, on meta", "density": 0.8,
                     "source": "table", "dense_seconds": None, "sparse_seconds": None}


def test_a_run_hands_dense_layers_to_the_fallback_attention_after_a_quarter_of_the_steps_that_skip():
    run = sampling_run(12, above(0.05), warmup_steps=1)
    skipped, calls = play(run, 10)
    # Step 0 records; of the 11 others the first two are the trial.
    assert calls == [0, 0, 0, *[2] * 7]
    assert {mask.passes[0] for rows in run.masks.all_masks().values() for mask in rows.values()} == {3}
    assert torch.equal(forward(run, 0)[0], dense(*tokens(0)))
    summary = run.close()
    assert summary.dense_calls == {DENSE_FASTER: 16} and summary.sparse_calls == 6
    assert summary.tiles_total == 22 * TILES and summary.dense_tiles == 16 * TILES
    assert [share > 0 for share in skipped] == [step in (1, 2) for step in range(10)], "dense calls skip nothing"
    assert "dense attention is faster above 5% (table) of the tiles" in summary.text()


def test_each_layer_is_chosen_for_itself():
    run, calls = sampling_run(12, above(0.5), warmup_steps=1), []
    for step in range(6):
        if step == 2:
            for mask in next(iter(run.masks.all_masks().values())).values():
                mask.words.fill_(1)
        calls += play(run, 1, first=step)[1]
    assert calls == [0, 0, 0, 1, 1, 1], "the first layer has become sparse in the trial, the second one has not"


@pytest.mark.parametrize("known", [None, above(1.0)])
def test_no_layer_is_handed_over_where_sparse_attention_is_faster(known):
    run, plain = sampling_run(12, known, warmup_steps=1), sampling_run(12, above(1.0), warmup_steps=1)
    assert play(run, 6) == play(plain, 6) and all(map(torch.equal, forward(run, 6), forward(plain, 6)))
    assert "dense attention is faster" not in run.close().text()


def test_a_layer_that_stays_dense_needs_no_mask_for_a_new_row(monkeypatch):
    run = sampling_run(12, above(0.05), warmup_steps=1)
    play(run, 3, rows=("positive",))
    monkeypatch.setattr(SkipMask, "full", lambda *args, **kwargs: pytest.fail("a mask for a call that stays dense"))
    forward(run, 3)
    assert run.close().dense_calls == {DENSE_FASTER: 2}


class GpuTimes(AttentionTimes):
    """Takes every device for a GPU."""

    def wants_dense(self, shape, block):
        return super().wants_dense(shape and shape._replace(device=META), block)

    def timed(self, shape, *args, **kwargs):
        return super().timed(shape and shape._replace(device=META), *args, **kwargs)

    def add_sparse(self, layer, shape):
        super().add_sparse(layer, shape and shape._replace(device=META))


def test_what_a_run_times_decides_in_it_and_in_the_next(monkeypatch):
    """Dense calls of the warm-up step, then sparse calls over every tile; no call is made for its time."""
    monkeypatch.setattr("liteattention.runtime.run.AttentionTimes", GpuTimes)
    fallback, started = Fallback(), []

    class SlowSparse:
        def __init__(self, device):
            started.append(device)
            self.calls = fallback.calls

        def stop(self):
            self.takes = 1.0 if fallback.calls > self.calls else 20.0

        def seconds(self):
            return self.takes

    known = BreakEvens(lambda *args: 1.0, SlowSparse)
    layers = [LayerId("double", i, 5) for i in range(5)]
    for number in range(2):
        run = sampling_run(12, known)
        # Step 0 is dense, 1 records, 2 and 3 skip; by then it is known that 20 s for every tile are too many.
        assert play(run, 5, layers=layers, fallback=fallback)[1] == [5, 0, 0, 0, 5], number
        summary = run.close()
        entry, = summary.break_evens
        assert (entry["source"], entry["density"]) == ("measured", DENSITY_MIN)
        assert (entry["dense_seconds"], entry["sparse_seconds"]) == (0.5, 10.0), "per batch entry of two"
        assert summary.saved.source == "timed calls" and summary.saved.share < 0
        assert len(started) == 2 * (SAMPLES + 1), "the second run has nothing left to time"


def test_a_run_of_few_steps_times_dense_calls_in_its_only_warm_up_step(monkeypatch):
    """One layer in four records a step later; nothing is computed twice, and the next run has nothing left to time."""
    monkeypatch.setattr("liteattention.runtime.run.AttentionTimes", GpuTimes)
    known = BreakEvens(lambda *args: 1.0, lambda device: Watch(SimpleNamespace(arrived=True), 2.0))
    monkeypatch.setattr(Watch, "seconds", lambda self: self.takes)
    layers = [LayerId("double", i, 20) for i in range(20)]
    bits = []
    for expected in ([4, 0, 0, 0], [0, 0, 0, 0]):
        fallback, run = Fallback(), sampling_run(4, known)
        skipped, calls = play(run, 4, layers=layers, fallback=fallback)
        assert calls == expected and skipped[1] > 0 and passes(run) == ([3, 4] if calls[0] else [4])
        bits.append(masks(run))
        summary = run.close()
        assert summary.saved is not None and summary.break_evens[0]["source"] == "measured"
        assert summary.sparse_calls + sum(summary.dense_calls.values()) == 80
    late = {f"double {i}" for i in (3, 7, 11, 15)}
    assert all(torch.equal(mask, bits[1][name]) for (name, mask) in bits[0].items() if name[0].block not in late)


def test_dense_calls_after_a_failure_are_still_timed(kernel):
    run = sampling_run(4)
    play(run, 2)
    kernel.fails = lambda kwargs: RuntimeError("no kernel image")
    play(run, 2)
    summary = run.close()
    assert summary.dense_calls == {KERNEL_FAILED: 4}
    dense_clock = run.times._clock[DENSE]
    assert summary.saved.dense_seconds == pytest.approx(dense_clock / summary.dense_tiles * summary.tiles_total)
