"""A sampling run from its first step to its summary, without ComfyUI; and what is left of it afterwards."""

import gc
import logging
import tracemalloc
import weakref

import pytest
import torch
from run_kit import LAYERS, TILES, Fallback, N, dense, forward, passes, sampling_run, tokens

from liteattention.runtime import AttentionCall, LiteAttentionConfig, SamplingRun
from liteattention.runtime.reasons import WARMUP


def test_a_run_warms_up_records_skips_and_accounts_for_every_call():
    run, fallback = sampling_run(12), Fallback()
    for step in range(8):
        outs = forward(run, step, fallback=fallback)
        for out in outs:
            assert torch.allclose(out, dense(*tokens(step)), atol=0.2)
        if step < 2:
            assert torch.allclose(outs[0], dense(*tokens(step)), atol=1e-5), "warm-up computes every tile"
        report = run.end_step(step)
        assert (report.step, report.total_steps, report.mask_bytes) == (step + 1, 12, run.masks.nbytes)
        assert report.phase == ("warm-up", "recording", "sparse")[min(step, 2)] and (report.skipped > 0) == (step >= 2)
    summary = run.close()
    assert fallback.calls == 2, "only the first of two warm-up steps stays dense"
    assert summary.sparse_calls == 14 and summary.dense_calls == {WARMUP: 2}
    assert summary.forward_passes == 8 and (summary.steps_done, summary.total_steps) == (8, 12)
    assert summary.skipped_per_step[:2] == [0, 0]
    assert summary.skipped_per_step[2:] == sorted(summary.skipped_per_step[2:]), "the mask only shrinks"
    assert (summary.tiles_total, summary.dense_tiles) == (16 * TILES, 2 * TILES)
    assert summary.skipped == pytest.approx(sum(summary.skipped_per_step) / 8) == report.skipped_so_far
    assert summary.layers.keys() == {"double 0", "double 1"} and summary.layers["double 0"][0] is None
    assert summary.tokens == N and summary.mask_bytes == run.masks.peak_bytes
    assert summary.backend == "torch backend on cpu" and summary.settings == run.config.to_dict()
    assert summary.saved.source == "the clock" and 0 < summary.saved.sparse_seconds <= summary.seconds


def test_each_step_is_reported_as_it_ends():
    reports = []
    run = SamplingRun(LiteAttentionConfig(), 4, on_step=reports.append)
    assert [run.end_step(step) for step in range(3)] == reports and [report.step for report in reports] == [1, 2, 3]


def test_a_step_without_attention_has_no_share_and_ages_nothing():
    run = sampling_run(8, warmup_steps=1)
    forward(run, 0)
    run.end_step(0)
    assert run.end_step(1).skipped is None
    forward(run, 2)
    run.end_step(2)
    assert passes(run) == [2] and run.close().skipped_per_step[1] is None


def test_a_sampler_may_leave_out_or_repeat_the_number_of_a_step():
    run = sampling_run(8)
    for step in (0, 3, 2):
        run.end_step(step)
    assert run.step == 4


def test_a_run_that_is_stopped_has_a_summary_of_what_it_did():
    run = sampling_run(12)
    forward(run, 0)
    summary = run.close()
    assert (summary.steps_done, summary.dense_calls, summary.skipped_per_step) == (0, {WARMUP: 2}, [0])
    assert summary.seconds is None and summary.headline() == "off: warm-up step"
    assert sampling_run().close().headline().startswith("off: no attention call reached LiteAttention")


def test_out_of_memory_in_the_kernel_reaches_the_caller_and_the_run_can_go_on(kernel):
    run = sampling_run(4, pool_skipped=False)
    kernel.fails = lambda kwargs: torch.OutOfMemoryError("out")
    with pytest.raises(torch.OutOfMemoryError):
        forward(run, 0)
    kernel.fails = lambda kwargs: None
    forward(run, 0)
    run.end_step(0)
    summary = run.close()
    assert summary.sparse_calls == 2 and not summary.dense_calls and summary.tiles_computed == summary.tiles_total


def test_closing_frees_every_tensor_and_can_be_repeated():
    run = sampling_run(4)
    forward(run, 0)
    words = [weakref.ref(mask.words) for rows in run.masks.all_masks().values() for mask in rows.values()]
    assert len(words) == 4
    summary = run.close()
    gc.collect()
    assert all(w() is None for w in words) and run.close() is summary


def test_memory_is_freed_even_if_the_device_no_longer_answers(monkeypatch):
    run = sampling_run(4)
    forward(run, 0)

    def end_step(step):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(run.counters, "end_step", end_step)
    assert run.close().sparse_calls == 2 and not run.masks.all_masks()


def test_a_failed_read_of_the_counters_does_not_hold_the_clock(monkeypatch):
    run = sampling_run(4)

    def end_step(step):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(run.counters, "end_step", end_step)
    with pytest.raises(RuntimeError):
        run.end_step(0)
    assert run.step == 1


def test_nothing_outlives_a_run():
    """As many tensors as before after every 40 runs, and no more memory than 40 runs earlier."""
    x = torch.randn(1, 130, 64)

    def sample(number):
        run = sampling_run(4, warmup_steps=0)
        for step in range(2):
            forward_pass = run.forward_pass(model="m", rows=["p"], video_tokens=130)
            for layer in LAYERS:
                forward_pass.attend(AttentionCall.from_hook(x, x, x, 1), layer, lambda: None)
            run.end_step(step)
        if number % 2:
            sampling_run(4, carried=run.carry()[0]).close()
        return run.close().sparse_calls

    def tensors():
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    logging.disable(logging.CRITICAL)  # pytest keeps every record
    tracemalloc.start()
    try:
        for number in range(10):
            assert sample(number) == 4
        before, memory = tensors(), [tracemalloc.get_traced_memory()[0]]
        for _ in range(4):
            for number in range(40):
                sample(number)
            assert tensors() == before
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    # Interpreter and torch keep small objects for reuse, now more and now fewer; a leak shows in every window.
    grown = min(after - at for at, after in zip(memory, memory[1:], strict=False))
    assert grown < 4 * 2**10, f"{memory} bytes after every 40 runs"
