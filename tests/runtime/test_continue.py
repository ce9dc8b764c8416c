"""A run that goes on with the masks of the one before it, and the handle that holds them until then."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from run_kit import LAYERS, N, dense, forward, masks, passes, play, sampling_run, tokens

from liteattention.kernels import SkipMask
from liteattention.runtime import CarriedMasks, RowName, RunHandle, Threshold, VideoTokens
from liteattention.runtime import run as run_module
from liteattention.runtime.masks import NO_MATCH, RESIZED, CarriedMask, LayerKey, MaskTable, Signature
from liteattention.runtime.reasons import KERNEL_FAILED
from liteattention.runtime.video_tokens import Grid

CPU = torch.device("cpu")


def finished(handle=None, prompt=None, **kwargs):
    """A handle whose run of two steps is over, and the summary of the run."""
    handle = handle or RunHandle()
    handle.start(prompt)
    run = sampling_run(2)
    play(run, 2, **kwargs)
    handle.finish(run)
    return handle, run.close()


def continuing(handle, total=2, **settings):
    masks, why = handle.carried()
    assert masks is not None and why == ""
    return sampling_run(total, carried=masks, **settings)


def test_two_and_two_steps_skip_in_all_but_the_first():
    handle = RunHandle()
    handle.start()
    first = sampling_run(2)
    shares = play(first, 2)[0]
    handle.finish(first)
    first.close()
    second = continuing(handle)
    more, calls = play(second, 2, first=2)
    shares += more
    assert shares[0] == 0 and 0 < shares[1] <= shares[2] <= shares[3] and calls == [0, 0]
    summary = second.close()
    assert "2 steps with the masks of the run before" in summary.text() and not summary.notes
    assert play(sampling_run(4), 4)[0] == shares, "as if it had been one run"


def test_the_first_step_is_sparse_also_where_the_plan_has_a_warm_up():
    second = continuing(finished()[0], 20, warmup_steps=5)
    forward(second, 2, fallback=pytest.fail)
    report = second.end_step(0)
    assert report.skipped > 0 and report.phase == "sparse"


def test_dense_end_steps_hold_for_a_continued_run_too():
    skipped, calls = play(continuing(finished()[0], dense_end_steps=1), 2, first=2)
    assert skipped[1] == 0 and calls == [0, 2]


def test_a_row_without_a_mask_warms_up_next_to_one_that_continues():
    second = continuing(finished(rows=("positive",))[0], 12)
    ages = []
    for step in range(3):
        forward(second, 2 + step)
        second.end_step(step)
        rows = next(iter(second.masks.all_masks().values()))
        ages.append((rows["negative", 0].passes[0], rows["positive", 0].passes[0]))
    assert ages == [(1, 3), (1, 4), (2, 5)], "warm-up, recording, sparse; and on"
    summary = second.close()
    assert summary.skipped_per_step[0] > 0 and summary.notes == [f"2 layers: {NO_MATCH}"]


def test_a_row_that_warms_up_next_to_another_computes_every_tile():
    second = continuing(finished(rows=("positive",))[0], 12, rule=Threshold(-2.0))
    for step in range(2):
        outs = forward(second, 2 + step)
        assert torch.allclose(outs[0][0], dense(*tokens(2 + step))[0], atol=1e-5)
        second.end_step(step)


def test_a_run_where_nothing_fits_warms_up_as_usual_and_says_so():
    second = continuing(finished(rows=("other",))[0], 12)
    skipped, calls = play(second, 3, first=2)
    assert skipped[:2] == [0, 0] and skipped[2] > 0 and calls == [2, 0, 0]
    summary = second.close()
    assert "steps 1-2 of 12 dense" in summary.text() and summary.notes == [f"2 layers: {NO_MATCH}"]


def test_another_size_warms_up_and_the_note_has_both_sizes():
    second = continuing(finished()[0], 12)
    skipped, calls = play(second, 3, n=512, video_tokens=512)
    assert skipped[:2] == [0, 0] and calls == [2, 0, 0]
    note, = second.close().notes
    assert "2 heads x 640 tokens x 64" in note and "2 heads x 512 tokens x 64" in note


def test_another_size_of_a_known_grid_goes_on_from_its_first_step():
    handle = RunHandle()
    handle.start()
    first = sampling_run(2)
    play(first, 2, video_tokens=VideoTokens(N, grid=(5, 8, 16)))
    carried = masks(first)  # a frame is one tile, then four
    handle.finish(first)
    first.close()
    second = continuing(handle, 3, rule=Threshold(-30.0))
    skipped, calls = play(second, 3, first=2, n=4 * N, video_tokens=VideoTokens(4 * N, grid=(5, 16, 32)))
    assert skipped[0] > 0 and calls == [0, 0, 0]
    for place, bits in masks(second).items():
        assert torch.equal(bits, carried[place].repeat_interleave(4, 2).repeat_interleave(4, 3))
    summary = second.close()
    assert "3 steps with the masks of the run before" in summary.text() and not summary.notes


def test_a_grid_that_changes_in_mid_run_keeps_its_masks_and_has_one_note():
    run = sampling_run(8)
    small, large = VideoTokens(N, grid=(5, 8, 16)), VideoTokens(2 * N, grid=(5, 8, 32))
    play(run, 3, video_tokens=small)
    ages, before = passes(run), play(run, 1, video_tokens=small)[0]
    after, calls = play(run, 2, n=2 * N, video_tokens=large)
    assert 0 < before[0] <= after[0] and calls == [0, 0] and passes(run) == [ages[0] + 3]
    assert run.close().notes == [f"2 layers: {RESIZED}"]


def test_masks_stay_with_the_handle_until_its_next_run_or_its_end():
    handle, summary = finished()
    assert handle.masks.nbytes == summary.carried_bytes == 4 * SkipMask.full(1, 2, N).nbytes
    for _ in range(2):  # a prompt that is queued again, with the first sampler from ComfyUI's cache
        second = continuing(handle)
        play(second, 2, first=2)
        second.close()
    words = [weakref.ref(carried.mask.words) for carried in handle.masks]
    del second
    handle.start()
    gc.collect()
    assert all(w() is None for w in words) and handle.carried() == (None, run_module.NOT_FINISHED)


def test_a_run_changes_no_mask_that_it_has_carried_over():
    handle, _ = finished()
    before = {carried: carried.mask.to_bool() for carried in handle.masks}
    play(continuing(handle, rule=Threshold(-1.0)), 2, first=2)
    assert all(torch.equal(carried.mask.to_bool(), bits) for carried, bits in before.items())


def test_a_handle_says_why_it_has_no_masks(monkeypatch):
    handle = RunHandle()
    assert handle.carried() == (None, run_module.NO_RUN)
    handle.start()
    assert handle.carried() == (None, run_module.NOT_FINISHED)
    handle.finish(sampling_run(2))
    assert handle.carried() == (None, run_module.NOTHING)
    failed = sampling_run(2)
    play(failed, 2)
    failed.sparse.failed = KERNEL_FAILED
    handle.finish(failed)
    assert handle.carried() == (None, run_module.LOST)


def test_no_memory_to_carry_masks_over_is_a_note(monkeypatch):
    def carry(table):
        raise torch.OutOfMemoryError("main memory")

    monkeypatch.setattr(MaskTable, "carry", carry)
    handle, summary = finished()
    assert handle.carried() == (None, run_module.LOST) and "main memory" in summary.text()


def test_one_of_several_runs_in_a_prompt_is_not_guessed():
    """One model for two samplers, or a list of latents: the second run may be of another clip."""
    handle = RunHandle()
    for prompt, several in (("a", False), ("a", True), ("a", True), ("b", False), (None, False), (None, False)):
        finished(handle, prompt)
        assert (handle.carried() == (None, run_module.SEVERAL)) == several
        assert handle.masks is not None, "for a report of the last run"


def test_the_handle_knows_where_the_frames_of_its_run_lie():
    handle = RunHandle()
    handle.start()
    run = sampling_run(2)
    forward(run, 0, video_tokens=VideoTokens(N, grid=(5, 8, 16)))
    handle.finish(run)
    assert handle.layout.frame_edges(N) == (0, 1, 2, 3, 4, 5)
    handle.start()
    assert handle.layout is None


def key(name="double 0", model="m", **kwargs):
    return LayerKey(model, CPU, name, **kwargs)


def carried(row, model="m", seqlen=N, **kwargs):
    mask = SimpleNamespace(nbytes=0)
    return CarriedMask(key(model=model, **kwargs), row, Signature(2, seqlen, 64, torch.float16), mask)


def find(masks, row, model="m2", seqlen=N, used=(), **kwargs):
    return CarriedMasks(masks).find(key(model=model, **kwargs), row, Signature(2, seqlen, 64, torch.bfloat16), used)


def test_rows_are_matched_by_role_across_samplers_networks_and_precisions():
    positive, negative = masks = [carried(RowName("a", 0, 0)), carried(RowName("b", 1, 0))]
    assert find(masks, RowName("x", 1, 0)) == (negative, "") and find(masks, RowName("y", 0, 0)) == (positive, "")
    assert find(masks, RowName("y", 0, 0), used=[positive]) == (None, NO_MATCH), "each once"


@pytest.mark.parametrize("other", [{"name": "double 1"}, {"ordinal": 1}, {"window": (0, 1)}])
def test_layers_are_matched_by_place(other):
    assert find([carried(RowName("a", 0, 0))], RowName("a", 0, 0), **other) == (None, NO_MATCH)


def test_another_shape_is_no_match():
    mask, why = find([carried(RowName("a", 0, 0))], RowName("a", 0, 0), seqlen=1280)
    assert mask is None and "2 heads x 640 tokens x 64" in why and "2 heads x 1280 tokens x 64" in why


def test_a_mask_of_the_same_size_comes_before_one_of_another_grid():
    def sized(frames, uuid):
        signature = Signature(2, N, 64, torch.float16, Grid(0, frames, 8, N // 8 // frames))
        return CarriedMask(key(), RowName(uuid, 0, 0), signature, SimpleNamespace(nbytes=0))

    other, same = found = [sized(4, "a"), sized(5, "b")]
    where = key(), RowName("x", 0, 0)
    assert CarriedMasks(found).find(*where, same.signature) == (same, "")
    assert CarriedMasks([other]).find(*where, same.signature) == (other, "")
    assert CarriedMasks([other]).find(*where, same.signature._replace(heads=4))[0] is None


def test_two_prompts_of_one_role_are_not_confused():
    a, b = masks = [carried(RowName("a", 0, 0)), carried(RowName("b", 0, 0))]
    assert find(masks, RowName("x", 0, 0)) == (None, NO_MATCH), "either could be it"
    assert find(masks, RowName("b", 0, 0)) == (b, ""), "a guider that is used again knows"
    assert find(masks, RowName("x", 0, 0), used=[b]) == (a, "")


def test_two_networks_in_one_run_keep_their_own():
    a, b = masks = [carried(RowName("a", 0, 0), model="m1"), carried(RowName("a", 0, 0), model="m2")]
    assert find(masks, RowName("x", 0, 0), model="m3") == (None, NO_MATCH)
    assert find(masks, RowName("x", 0, 0), model="m2") == (b, "")
    assert find(masks, RowName("x", 0, 0), model="m1") == (a, "")


def test_a_report_reads_the_masks_of_the_first_prompt_by_layer():
    first, second = carried(RowName("a", 0, 0)), carried(RowName("a", 0, 0), ordinal=1)
    masks = CarriedMasks([carried(RowName("n", 1, 0)), first, second])
    assert masks.by_layer() == {"double 0": first.mask, "double 0 #2": second.mask}


def test_only_masks_that_have_recorded_are_carried():
    run = sampling_run(2)
    play(run, 1, rows=("positive",))
    run.masks.open(key(), ["negative"], Signature(2, N, 64, torch.float32))
    assert [c.row for c in run.masks.carry()] == [("positive", 0)] * len(LAYERS)
