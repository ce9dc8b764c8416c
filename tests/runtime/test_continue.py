"""A run that goes on with the masks of the one before it."""

import gc
import weakref

import pytest
import torch
from run_kit import LAYERS, N, Previous, dense, forward, tokens
from run_kit import session as open_session

from liteattention.kernels import SkipMask
from liteattention.runtime import KeptMasks, LiteAttentionConfig, RowName, RunHandle, Session, kept
from liteattention.runtime.kept import Signature
from liteattention.runtime.state import LayerKey

CPU = torch.device("cpu")


def session(total=2, kept_masks=None, **settings):
    return Session(LiteAttentionConfig(**{"threshold": -4.0, "min_tokens": 128, **settings}), total, kept=kept_masks)


def play(run, first=0, steps=2, rows=("negative", "positive"), **kwargs):
    shares = []
    for step in range(steps):
        forward(run, first + step, rows=rows, **kwargs)
        shares.append(run.end_step(step).skipped)
    return shares


def first_run(handle=None, wanted=True, **kwargs):
    handle = handle or RunHandle()
    handle.start()
    run = session()
    play(run, **kwargs)
    handle.keep(run, wanted)
    return handle, run.close()


def test_two_and_two_steps_skip_in_all_but_the_first():
    handle = RunHandle()
    handle.start()
    run = session()
    shares = play(run)
    handle.keep(run, True)
    run.close()
    masks, why = handle.take()
    assert why == ""
    second, previous = session(kept_masks=masks), Previous()
    shares += play(second, 2, previous=previous)
    assert shares[0] == 0 and 0 < shares[1] <= shares[2] <= shares[3] and previous.calls == 0
    receipt = second.close()
    assert "2 steps that continue the run before" in receipt.text() and not receipt.notes
    whole = open_session(total=4)
    assert play(whole, steps=4) == shares, "as if it had been one run"


def test_the_first_step_is_sparse_also_where_the_plan_has_a_warm_up():
    handle, _ = first_run()
    second, previous = session(20, handle.take()[0], warmup_steps=5), Previous()
    forward(second, 2, previous=previous)
    report = second.end_step(0)
    assert previous.calls == 0 and report.skipped > 0 and report.phase == "sparse step"


def test_dense_end_steps_hold_for_a_continued_run_too():
    handle, _ = first_run()
    second, previous = session(2, handle.take()[0], dense_end_steps=1), Previous()
    assert play(second, 2, previous=previous)[1] == 0 and previous.calls == 2


def test_a_row_without_a_mask_warms_up_next_to_one_that_continues():
    handle, _ = first_run(rows=("positive",))
    second = session(12, handle.take()[0])
    ages = []
    for step in range(3):
        forward(second, 2 + step)
        second.end_step(step)
        rows = next(iter(second.masks.all_masks().values()))
        ages.append((rows["negative", 0].passes[0], rows["positive", 0].passes[0]))
    assert ages == [(1, 3), (1, 4), (2, 5)], "warm-up, recording, sparse; and on"
    receipt = second.close()
    assert receipt.skipped_per_step[0] > 0 and [n for n in receipt.notes if kept.NO_MATCH in n]


def test_a_row_that_warms_up_next_to_another_computes_every_tile():
    handle, _ = first_run(rows=("positive",))
    second = session(12, handle.take()[0], threshold=-2.0)
    for step in range(2):
        outs = forward(second, 2 + step)
        assert torch.allclose(outs[0][0], dense(*tokens(2 + step))[0], atol=1e-5)
        second.end_step(step)


def test_a_run_where_nothing_fits_warms_up_as_usual_and_says_so():
    handle, _ = first_run(rows=("other",))
    second, previous = session(12, handle.take()[0]), Previous()
    assert play(second, 2, previous=previous, steps=3)[:2] == [0, 0] and previous.calls == 2
    receipt = second.close()
    assert "steps 1-2 of 12 dense" in receipt.text() and kept.NO_MATCH in receipt.text() and len(receipt.notes) == 1


def test_masks_are_kept_only_if_wanted_and_freed_when_taken_or_replaced():
    handle, receipt = first_run(wanted=False)
    assert receipt.kept_bytes == handle.kept_bytes == 0 and handle.take() == (None, kept.NOT_ASKED)

    handle, receipt = first_run()
    one = SkipMask.full(1, 2, N).nbytes
    assert receipt.kept_bytes == handle.kept_bytes == 4 * one and "kept for continue_from" in receipt.text()
    words = [weakref.ref(k.mask.words) for entries in handle._kept._kept.values() for k in entries]
    masks, _ = handle.take()
    assert handle.kept_bytes == 0 and handle.take() == (None, kept.NO_RUN)
    second = session(kept_masks=masks)
    play(second, 2, rows=("positive",))
    assert masks.nbytes == 2 * one, "rows that the second run does not have wait until its end"
    second.close()
    gc.collect()
    assert masks.nbytes == 0 and len(words) == 4 and all(w() is None for w in words)

    handle, _ = first_run()
    words = [weakref.ref(k.mask.words) for entries in handle._kept._kept.values() for k in entries]
    handle.start()
    gc.collect()
    assert all(w() is None for w in words) and handle.take() == (None, kept.NOT_FINISHED)

    handle, _ = first_run()
    words = [weakref.ref(k.mask.words) for entries in handle._kept._kept.values() for k in entries]
    del handle
    gc.collect()
    assert all(w() is None for w in words)


def test_masks_of_another_prompt_are_not_taken():
    handle = RunHandle()
    handle.start("prompt 1")
    run = session()
    play(run)
    handle.keep(run, True)
    assert handle.take("prompt 2") == (None, kept.NO_RUN) and handle.kept_bytes == 0
    assert RunHandle().take("prompt 2") == (None, kept.NO_RUN)


def test_one_of_several_runs_is_not_guessed():
    """One model for two samplers, or a list of latents: the second run may be of another clip."""
    handle = RunHandle()

    def play_one(prompt):
        handle.start(prompt)
        run = session()
        play(run)
        handle.keep(run, True)

    for taken in (True, False):
        for _ in range(2):
            play_one(f"{taken}")
            if taken:
                assert handle.take("True")[1] == ""
    assert handle.kept_bytes == 0 and [handle.take("False") for _ in range(2)] == [(None, kept.SEVERAL)] * 2
    play_one("False")
    assert handle.take("False") == (None, kept.SEVERAL)
    play_one("another")
    assert handle.take("another")[1] == ""


def test_a_run_that_gave_up_or_recorded_nothing_keeps_nothing():
    handle = RunHandle()
    handle.start()
    run = session()
    play(run)
    run.failed = True
    handle.keep(run, True)
    assert handle.take() == (None, kept.LOST)
    handle.start()
    handle.keep(session(), True)
    assert handle.take() == (None, kept.NOTHING)


def test_no_memory_to_keep_masks_is_a_note(monkeypatch):
    handle = RunHandle()
    handle.start()
    run = session()
    play(run)

    def add(*args):
        raise torch.OutOfMemoryError("main memory")

    monkeypatch.setattr(KeptMasks, "add", add)
    handle.keep(run, True)
    assert handle.take() == (None, kept.LOST) and "main memory" in run.close().text()


def test_a_lower_state_limit_holds_for_masks_that_are_taken_over():
    handle, _ = first_run()
    second = session(kept_masks=handle.take()[0])
    second.masks.limit_bytes = 2 * SkipMask.full(1, 2, N).nbytes
    play(second, 2)
    assert second.masks.nbytes <= second.masks.limit_bytes and len(second.close().dense_layers) == 1


def key(name="double 0", model="m", **kwargs):
    return LayerKey(model, CPU, name, **kwargs)


def entry(masks, row, model="m", seqlen=N, dtype=torch.float16, **kwargs):
    mask = SkipMask.full(1, 2, seqlen)
    masks.add(key(model=model, **kwargs), row, Signature(2, seqlen, 64, dtype), mask)
    return mask


def take(masks, row, model="m2", seqlen=N, dtype=torch.bfloat16, **kwargs):
    return masks.take(key(model=model, **kwargs), row, Signature(2, seqlen, 64, dtype))


def test_rows_are_matched_by_role_across_samplers_networks_and_precisions():
    masks = KeptMasks()
    positive, negative = entry(masks, RowName("a", 0, 0)), entry(masks, RowName("b", 1, 0))
    assert take(masks, RowName("x", 1, 0)) == (negative, "") and take(masks, RowName("y", 0, 0)) == (positive, "")
    assert take(masks, RowName("y", 0, 0)) == (None, kept.NO_MATCH), "each once"


@pytest.mark.parametrize("other", [{"name": "double 1"}, {"ordinal": 1}, {"window": (0, 1)}])
def test_layers_are_matched_by_place(other):
    masks = KeptMasks()
    entry(masks, RowName("a", 0, 0))
    assert take(masks, RowName("a", 0, 0), **other) == (None, kept.NO_MATCH)


def test_another_shape_starts_fresh_with_both_shapes_in_the_note():
    masks = KeptMasks()
    entry(masks, RowName("a", 0, 0))
    mask, why = take(masks, RowName("a", 0, 0), seqlen=1280)
    assert mask is None and "2 heads x 640 tokens x 64" in why and "2 heads x 1280 tokens x 64" in why


def test_two_prompts_of_one_role_are_not_confused():
    masks = KeptMasks()
    a, b = entry(masks, RowName("a", 0, 0)), entry(masks, RowName("b", 0, 0))
    assert take(masks, RowName("x", 0, 0)) == (None, kept.NO_MATCH), "either could be it"
    assert take(masks, RowName("b", 0, 0)) == (b, ""), "a guider that is used again knows"
    assert take(masks, RowName("x", 0, 0)) == (a, "")


def test_two_networks_in_one_run_keep_their_own():
    masks = KeptMasks()
    a, b = entry(masks, RowName("a", 0, 0), model="m1"), entry(masks, RowName("a", 0, 0), model="m2")
    assert take(masks, RowName("x", 0, 0), model="m3") == (None, kept.NO_MATCH)
    assert take(masks, RowName("x", 0, 0), model="m2") == (b, "") and take(masks, RowName("x", 0, 0), model="m1") == (
        a, "")


def test_refresh_goes_on_with_the_turns_of_the_run_before(monkeypatch):
    turns, reopen = [], SkipMask.reopen
    monkeypatch.setattr(SkipMask, "reopen", lambda mask, *args: turns.append(args) or reopen(mask, *args))
    handle, _ = first_run()
    second = session(4, handle.take()[0], refresh_every=3)
    play(second, 2)
    assert sorted(set(turns)) == [(3, 2), (3, 3)] and len(turns) == 2 * 2 * len(LAYERS)
