"""Layers that stay too dense in a run: left to the previous attention, tried again, accounted for. And precision."""

import json

import pytest
import torch
from run_kit import HEADS, LAYERS, N, Previous, dense, forward, session, tokens

from liteattention.kernels import PrecisionChoice, SkipMask
from liteattention.runtime import AttentionCall, BreakEvens, LayerId, evaluation, policy
from liteattention.runtime import session as session_module
from liteattention.runtime.statistics import COUNTERS, LAYERS_PER_BLOCK, Statistics

CPU = torch.device("cpu")
TILES = 2 * HEADS * 25
"""Of one call: two rows."""


def no_stopwatch(device):
    return None


def above(density):
    return BreakEvens(lambda *args: density, no_stopwatch)


def play(run, steps, previous=None):
    """Outputs of the last step, and the calls that went to `previous` in each."""
    left = []
    previous = previous or Previous()
    outs = None
    for step in range(steps):
        before = previous.calls
        outs = forward(run, step, previous=previous)
        run.end_step(step)
        left.append(previous.calls - before)
    return outs, left


def watched(monkeypatch, wrapped=None):
    """Keyword arguments of each call of the kernels."""
    seen = []
    attention = wrapped or evaluation.lite_attention

    def lite_attention(*args, **kwargs):
        seen.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(evaluation, "lite_attention", lite_attention)
    return seen


def test_dense_layers_go_to_the_previous_attention_and_come_back_every_fourth_step():
    run = session(total=12, warmup_steps=1, break_evens=above(0.05))
    outs, left = play(run, 10)
    # Step 0 records, step 1 is the first to know a density.
    assert left == [0, 0, 2, 2, 2, 0, 2, 2, 2, 0]
    passes = {mask.passes[0] for rows in run.masks.all_masks().values() for mask in rows.values()}
    assert passes == {4}, "the steps that try again record"
    outs, _ = play(run, 1)
    assert torch.equal(outs[0], dense(*tokens(0)))
    receipt = run.close()
    assert receipt.left == {policy.DENSE_FASTER: 14} and receipt.taken == 8
    assert receipt.tiles_total == 22 * TILES
    for step in (2, 3, 4, 6, 7, 8):
        assert receipt.skipped_per_step[step] == 0, "what is left counts as dense"
    for step in (1, 5, 9):
        assert receipt.skipped_per_step[step] > 0
    assert f"14 {policy.DENSE_FASTER}" in receipt.text()
    assert "dense attention is faster above 5% (table) of the tiles" in receipt.text()
    entry, = json.loads(json.dumps(receipt.to_dict()))["break_evens"]
    assert entry["density"] == 0.05 and entry["source"] == "table"


def test_a_layer_that_has_become_sparse_enough_stays_with_us():
    run = session(total=12, warmup_steps=1, break_evens=above(0.5))
    lefts = []
    for step in range(10):
        if step == 4:
            key, rows = next(iter(run.masks.all_masks().items()))
            for mask in rows.values():
                mask.words.fill_(1)
        previous = Previous()
        forward(run, step, previous=previous)
        run.end_step(step)
        lefts.append(previous.calls)
    # Step 5 tries again: the first layer has become sparse, the second one has not.
    assert run.statistics.density(key, CPU) == 0.2
    assert lefts == [0, 0, 2, 2, 2, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("settings, break_evens", [({"never_slower": False}, above(0.05)), ({}, None),
                                                   ({}, above(1.0)), ({}, BreakEvens())])
def test_nothing_is_left_if_it_is_off_or_ours_is_faster(settings, break_evens):
    run = session(total=12, warmup_steps=1, break_evens=break_evens, **settings)
    plain = session(total=12, warmup_steps=1)
    outs, left = play(run, 6)
    assert left == [0] * 6 and all(map(torch.equal, outs, play(plain, 6)[0]))
    receipt = run.close()
    assert "dense attention is faster" not in receipt.text()
    assert bool(receipt.break_evens) == (break_evens is not None and not settings)


def test_what_a_run_times_decides_in_it_and_in_the_next(monkeypatch):
    """Dense calls of the warm-up step, then our first full calls; the clock says what each side takes."""
    started = []

    class Watch:
        def __init__(self, device):
            started.append(device)
            self.number = len(started)

        def stop(self):
            self.takes = takes[self.number > 4]

        def seconds(self):
            return self.takes

    takes = [1.0, 20.0]
    known = BreakEvens(lambda *args: 1.0, Watch)
    seen = watched(monkeypatch)
    layers = [LayerId("double", i, 4) for i in range(5)]
    for number in range(2):
        run = session(total=12, break_evens=known)
        seen.clear()
        left = []
        for step in range(4):
            previous = Previous()
            forward(run, step, previous=previous, layers=layers)
            run.end_step(step)
            left.append(previous.calls)
        assert left == [5, 0, 0, 5], number
        assert [kwargs["skip_now"] for kwargs in seen] == [False] * 4 + [True] + [False] * 5, number
        entry, = run.close().break_evens
        assert entry["source"] == "measured" and entry["density"] == 0.05
        assert (entry["dense_seconds"], entry["ours_seconds"]) == (0.5, 10.0), "per row of two"
    assert len(started) == 8, "nothing was left to time in the second run"


def test_without_a_warm_up_the_layers_that_are_left_are_timed():
    class Watch:
        def __init__(self, device):
            self.stop = int

        def seconds(self):
            return 1.0

    run = session(total=4, warmup_steps=1, break_evens=BreakEvens(lambda *args: 0.05, Watch))
    for step in range(3):
        forward(run, step, layers=[LayerId("double", i, 4) for i in range(4)])
        run.end_step(step)
    entry, = run.close().break_evens
    assert entry["dense_seconds"] == entry["ours_seconds"] == 0.5


class Clock:
    """A stopwatch by which dense calls take 1 s and ours 4; dense ones are those that `previous` has just served."""

    previous = Previous()

    def __init__(self, device):
        self.before = self.previous.calls

    def stop(self):
        self.takes = 4.0 if self.previous.calls == self.before else 1.0

    def seconds(self):
        return self.takes


def few_steps(steps, known, previous, layers=6, **settings):
    """A run without a dense step: what went to `previous` in each step, and the receipt."""
    Clock.previous = previous
    run, calls = session(total=4, break_evens=known, **settings), []
    for step in range(steps):
        before = previous.calls
        forward(run, step, previous=previous, layers=[LayerId("double", i, layers) for i in range(layers)])
        run.end_step(step)
        calls.append(previous.calls - before)
    return calls, run.close()


def test_few_steps_time_dense_calls_beside_the_first_recording_ones():
    """A warm-up of one step leaves no call to the previous attention; the table alone would decide."""
    known = BreakEvens(lambda *args: 1.0, Clock)
    for first in (4, 0):  # in the second run nothing is left to time
        calls, receipt = few_steps(3, known, Previous())
        # From the third step on, when their share is known, the layers are too dense for a quarter of the speed.
        assert calls == [first, 0, 6] and receipt.taken == 12 and receipt.left == {policy.DENSE_FASTER: 6}
        entry, = receipt.break_evens
        assert entry["source"] == "measured" and entry["dense_seconds"] == 0.5 and entry["ours_seconds"] == 2.0
        assert receipt.saved.source == "timed calls" and receipt.dense_run_seconds is not None
        assert receipt.tiles_total == 18 * TILES, "calls for their time alone are in no count"


@pytest.mark.parametrize("fails", [False, True])
def test_a_dense_call_for_its_time_changes_no_bit_and_fails_in_silence(fails):
    plain, timed = session(total=4), session(total=4, break_evens=BreakEvens(lambda *args: 1.0, Clock))
    calls = Clock.previous = Previous()
    for step in range(3):
        expected = forward(plain, step)
        q, k, v = tokens(step)

        def previous():
            calls.calls += 1
            if fails:
                raise torch.OutOfMemoryError("out")
            return dense(q, k, v)  # noqa: B023

        context = timed.evaluation(model="m", rows=[("negative", 0), ("positive", 0)], latent_tokens=N)
        for layer, out in zip(LAYERS, expected, strict=True):
            assert torch.equal(context.attend(AttentionCall.from_hook(q, k, v, HEADS), layer, previous), out)
        plain.end_step(step)
        timed.end_step(step)
    receipt = timed.close()
    assert receipt.taken == 6 and calls.calls == (1 if fails else 2)
    assert [note.split(".")[0] for note in receipt.notes] == fails * [
        "attention cannot be timed here; a built-in value decides where dense attention is faster"]


def test_what_takes_q_k_v_away_is_not_called_twice():
    run = session(total=4, break_evens=BreakEvens(lambda *args: 1.0, Clock))
    q, k, v = tokens(0)
    context = run.evaluation(model="m", rows=(1, 2), latent_tokens=N)
    context.attend(AttentionCall.from_hook(q, k, v, HEADS), LAYERS[0], pytest.fail, repeatable=False)
    assert run.close().taken == 1


def test_with_log_details_few_steps_know_what_dense_attention_takes():
    calls, receipt = few_steps(2, None, previous := Previous(), log_details=True)
    assert calls == [3, 0] and previous.calls == 3
    assert receipt.saved.source == "log_details" and receipt.saved.dense_seconds > 0
    assert receipt.taken == 12 and receipt.dense_tiles == 0


def test_only_a_rows_first_recording_may_skip_at_once(monkeypatch):
    seen = watched(monkeypatch)
    play(session(total=8, warmup_steps=0), 3)
    assert [kwargs["skip_now"] for kwargs in seen] == [True, True] + [False] * 4


def test_several_shapes_are_each_compared_with_their_own():
    run = session(total=8, warmup_steps=1, break_evens=above(0.05))
    for step in range(3):
        for length in (N, 512):
            context = run.evaluation(model=length, rows=["r"], latent_tokens=length)
            parts = [x[:1, :length] for x in tokens(step)]
            context.attend(AttentionCall.from_hook(*parts, HEADS), LAYERS[0], lambda p=parts: dense(*p))
        run.end_step(step)
    receipt = run.close()
    assert receipt.left == {policy.DENSE_FASTER: 2}
    assert [e["shape"].split(", ")[0] for e in receipt.break_evens] == [f"2 heads x {n} tokens x 64" for n in (N, 512)]


def test_trouble_with_the_comparison_ends_no_render():
    def table(*args):
        raise OSError("no table")

    run = session(total=8, warmup_steps=1, break_evens=BreakEvens(table, no_stopwatch))
    _, left = play(run, 4)
    receipt = run.close()
    assert left == [0] * 4 and receipt.left == {} and receipt.break_evens == []
    assert len(receipt.notes) == 1 and "no table" in receipt.notes[0]


def test_the_counts_of_the_layers_sum_up_to_the_runs():
    run = session(total=8, warmup_steps=1)
    for step in range(4):
        masks = run.masks.all_masks()
        before = {key: sum(int(m.active_tiles()) for m in rows.values()) for key, rows in masks.items()}
        forward(run, step)
        run.end_step(step)
        for key, active in before.items():
            assert run.statistics.density(key, CPU) == active / TILES, "what the mask held when the step began"
        if step:
            assert run.statistics.per_step[step] == [sum(before.values()), 2 * TILES]
        else:
            assert run.statistics.density(next(iter(run.masks.all_masks())), CPU) is None, "recording is no measure"


def test_a_row_that_joins_late_does_not_count_for_the_density():
    run = session(total=8, warmup_steps=1)
    forward(run, 0, rows=("positive",))
    run.end_step(0)
    key = next(iter(run.masks.all_masks()))
    active = int(run.masks.all_masks()[key]["positive", 0].active_tiles())
    forward(run, 1)
    run.end_step(1)
    assert run.statistics.density(key, CPU) == 2 * active / TILES


def test_counters_grow_in_blocks_and_lose_nothing():
    guarded = []

    class Guard:
        def __enter__(self):
            guarded.append(1)

        def __exit__(self, *args):
            return None

    statistics = Statistics(Guard)
    layers = 2 * LAYERS_PER_BLOCK + 3
    for step in range(2):
        for layer in range(layers):
            with torch.inference_mode():
                counters = statistics.counters(layer, CPU)
                counters[step] += layer
            assert counters.shape == (COUNTERS,) and counters.is_contiguous() and counters.dtype == torch.int64
            statistics.count_layer(layer, CPU, 1000, 0)
            statistics.count_taken(0, 1000, N, 0.0)
        share = statistics.end_step(step)
        assert share == pytest.approx(1 - sum(range(layers)) / layers / 1000)
        assert [statistics.density(layer, CPU) for layer in range(layers)] == [i / 1000 for i in range(layers)]
    assert len(guarded) == 3
    assert statistics.tiles_computed == 2 * sum(range(layers))
    assert statistics.density("unknown", CPU) is None


def test_no_memory_for_counters_leaves_the_books_readable(monkeypatch):
    def zeros(*args, **kwargs):
        raise torch.OutOfMemoryError("counters")

    statistics = Statistics()
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError):
        statistics.counters(0, CPU)
    assert statistics.end_step(0) is None


@pytest.mark.parametrize("precision", ["auto", "full"])
def test_full_precision_on_a_cpu_is_no_news(monkeypatch, precision):
    seen = watched(monkeypatch)
    run = session(total=4, precision=precision)
    play(run, 2)
    assert {kwargs["precision"] for kwargs in seen} == {"full"} and run.close().notes == []


def test_int8_that_was_asked_for_and_is_not_there_is_noted_once(monkeypatch, caplog):
    seen = watched(monkeypatch)
    run = session(total=4, precision="int8")
    play(run, 3)
    note, = run.close().notes
    assert note.startswith("precision is full, not int8") and "Triton" in note
    assert caplog.text.count("not int8") == 1 and {kwargs["precision"] for kwargs in seen} == {"full"}


@pytest.fixture
def int8_device(monkeypatch):
    """precision_choice of a GPU with INT8; the kernels get "int8" and "full" as there, and compute on the CPU."""
    def precision_choice(device, head_dim, dtype, seqlen, requested, backend):
        return PrecisionChoice("full" if requested == "full" else "int8")

    monkeypatch.setattr(session_module, "precision_choice", precision_choice)


def test_without_memory_for_int8_the_call_and_the_run_go_on_in_full_precision(monkeypatch, int8_device, caplog):
    attention = evaluation.lite_attention

    def scarce(*args, precision, **kwargs):
        if precision == "int8" and len(seen) > 3:
            raise torch.OutOfMemoryError("INT8 copies")
        return attention(*args, precision="full", **kwargs)

    seen = watched(monkeypatch, scarce)
    run, plain = session(total=8, warmup_steps=1), session(total=8, warmup_steps=1, precision="full")
    outs, left = play(run, 4)
    tried = [kwargs["precision"] for kwargs in seen]
    assert tried == ["int8"] * 4 + ["full"] * 5 and left == [0] * 4
    assert all(map(torch.equal, outs, play(plain, 4)[0]))
    receipt, expected = run.close(), plain.close()
    assert receipt.taken == 8 and receipt.tiles_computed == expected.tiles_computed
    assert len(receipt.notes) == 1 and "precision is full for the rest" in receipt.notes[0]
    assert caplog.text.count("INT8 copies") == 1


def test_a_call_that_fails_is_no_sample(monkeypatch, int8_device):
    class Watch:
        def __init__(self, device):
            self.stop = lambda: stopped.append(device)

        def seconds(self):
            return 1.0

    def scarce(*args, precision, **kwargs):
        if precision == "int8":
            raise torch.OutOfMemoryError("INT8 copies")
        return attention(*args, precision=precision, **kwargs)

    stopped = []
    attention = evaluation.lite_attention
    monkeypatch.setattr(evaluation, "lite_attention", scarce)
    run = session(total=16, warmup_steps=1, break_evens=BreakEvens(lambda *args: 1.0, Watch))
    monkeypatch.setattr(evaluation.Evaluation, "_sample_dense", lambda *args: None)
    forward(run, 0)
    assert run.statistics.taken == 2 and len(stopped) == 1, "the first call and its second try count for nothing"


def test_no_memory_in_full_precision_either_is_the_hosts_business(monkeypatch, int8_device):
    def attention(*args, **kwargs):
        raise torch.OutOfMemoryError("out")

    seen = watched(monkeypatch, attention)
    run = session(total=4)
    with pytest.raises(torch.OutOfMemoryError):
        forward(run, 0)
        forward(run, 1)
    run.end_step(0)
    with pytest.raises(torch.OutOfMemoryError):
        forward(run, 1)
    assert [(kwargs["precision"], kwargs["pool_skipped"]) for kwargs in seen] == [
        ("int8", True), ("full", True), ("full", False), ("full", False)]
    assert not run.masks.all_masks()


def test_an_int8_call_that_fails_otherwise_is_not_tried_again(monkeypatch, int8_device):
    def attention(*args, **kwargs):
        raise RuntimeError("no kernel image")

    seen = watched(monkeypatch, attention)
    run = session(total=8, warmup_steps=1)
    play(run, 2)
    assert len(seen) == 1 and run.close().left == {policy.KERNEL_FAILED: 4}


def test_a_layer_that_is_left_needs_no_mask_for_a_new_row(monkeypatch):
    run = session(total=12, warmup_steps=1, break_evens=above(0.05))
    for step in range(2):
        forward(run, step, rows=("positive",))
        run.end_step(step)

    def full(*args, **kwargs):
        pytest.fail("a mask for a call that is left")

    monkeypatch.setattr(SkipMask, "full", full)
    forward(run, 2)
    assert run.close().left == {policy.DENSE_FASTER: 2}
