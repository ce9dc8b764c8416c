"""A forward pass: which calls stay dense and why, which mask a call gets, what is protected."""

import pytest
import torch
from run_kit import HEADS, LAYERS, Fallback, N, dense, forward, masks, passes, play, sampling_run, tokens

from liteattention.kernels import SkipMask
from liteattention.runtime import AttentionCall, LayerId, Threshold, reasons
from liteattention.runtime.compute import Plan
from liteattention.runtime.timing import BreakEvens


@pytest.mark.parametrize("settings, kwargs, reason", [
    ({"dense_blocks": "0--1"}, {}, reasons.DENSE_BLOCK),
    ({"dense_end_steps": 100}, {}, reasons.DENSE_END),
    ({}, {"stays_dense": reasons.EXTRA_PASS}, reasons.EXTRA_PASS),
    ({}, {"stays_dense": reasons.MOVING_WINDOWS}, reasons.MOVING_WINDOWS),
    ({}, {"layers": [None, None]}, reasons.NO_LAYER),
    ({}, {"video_tokens": None}, reasons.NO_LAYOUT),
    ({}, {"video_tokens": N + 1}, reasons.NOT_VIDEO),
    ({}, {"video_tokens": 100}, reasons.MOSTLY_EXTRA),
    ({}, {"rows": None}, reasons.NO_ROWS),
    ({"min_tokens": 641}, {}, reasons.TOO_SHORT),
    # Of several reasons the first in the list of checks counts.
    ({"dense_end_steps": 100, "dense_blocks": "0"}, {"stays_dense": reasons.EXTRA_PASS, "rows": None}, reasons.NO_ROWS),
    ({"dense_end_steps": 100, "dense_blocks": "0, 1"}, {}, reasons.DENSE_BLOCK),
])
def test_what_stays_dense_is_computed_by_the_fallback_attention_bit_for_bit(settings, kwargs, reason):
    run, fallback = sampling_run(4, **settings), Fallback()
    outs = forward(run, 0, fallback=fallback, **kwargs)
    assert all(torch.equal(out, dense(*tokens(0))) for out in outs)
    (counted, calls), = run.close().dense_calls.items()
    assert (counted.meaning, calls, fallback.calls) == (reason.meaning, 2, 2) and not run.masks.all_masks()


def test_rows_that_do_not_match_the_batch_are_no_identity():
    run = sampling_run(4)
    forward_pass = run.forward_pass(model="m", rows=["only"], video_tokens=N)
    q, k, v = tokens(0)
    forward_pass.attend(AttentionCall.from_hook(q, k, v, HEADS), LAYERS[0], lambda: dense(q, k, v))
    assert run.close().dense_calls == {reasons.NO_ROWS: 1}


def everything(run):
    """All that calls change, as text."""
    return repr([vars(run.counters), vars(run.times), run.notes.lines(), run.masks.nbytes, run.masks.carried_rows,
                 [(key, row, mask.words.tolist(), mask.passes) for key, rows in run.masks.all_masks().items()
                  for row, mask in rows.items()]])


@pytest.mark.parametrize("carried", [False, True])
def test_deciding_changes_nothing(carried):
    first = sampling_run(2)
    play(first, 2, rows=("positive",))
    run = sampling_run(12, BreakEvens(lambda *args: 0.6, lambda device: None), first.masks.carry() if carried else None,
                       dense_end_steps=2, dense_blocks="3")
    layers, decided = [LayerId("double", i, 4) for i in range(4)], set()
    q, k, v = tokens(0)
    call = AttentionCall.from_hook(q, k, v, HEADS)
    for step in range(12):
        forward_pass = run.forward_pass(model="m", rows=[("negative", 0), ("positive", 0)], video_tokens=N)
        for layer in layers:
            site = forward_pass._site(call, layer)
            assert forward_pass._other_attention(call, layer, site) is None
            before = everything(run)
            found = forward_pass._decide(call, layer, site, None)
            assert forward_pass._decide(call, layer, site, None) == found and everything(run) == before
            decided.add(str(found) if not isinstance(found, Plan) else f"restart {found.restart}")
        play(run, 1, first=step, layers=layers)
    assert decided == {"warm-up step", "dense end step", "dense_blocks", "dense attention is faster here",
                       "restart True", "restart False"}, "or the test shows little"


def test_trouble_outside_the_kernel_ends_no_render_either(monkeypatch):
    def skip_test(rule, *args):
        raise ZeroDivisionError("keys")

    monkeypatch.setattr(Threshold, "skip_test", skip_test)
    run = sampling_run(4)
    assert torch.equal(forward(run, 0)[1], dense(*tokens(0)))
    summary = run.close()
    assert summary.dense_calls == {reasons.KERNEL_FAILED: 2} and "ZeroDivisionError: keys" in summary.notes[0]


@pytest.mark.parametrize("error", [KeyError("lora"), torch.OutOfMemoryError("out")])
def test_an_error_of_the_fallback_attention_is_its_callers_and_counts_nothing(error):
    def fallback(*args):
        raise error

    run = sampling_run(4, dense_blocks="0--1")
    with pytest.raises(type(error)):
        forward(run, 0, fallback=fallback)
    summary = run.close()
    assert not summary.dense_calls and not summary.tiles_total and not summary.notes


def test_a_fallback_attention_may_free_the_calls_tensors():
    run = sampling_run(4, dense_blocks="0")
    q, k, v = tokens(0)
    call = AttentionCall.from_hook(q, k, v, HEADS)
    forward_pass = run.forward_pass(model="m", rows=["a", "b"], video_tokens=N)
    assert forward_pass.attend(call, LAYERS[0], lambda: call.release() or "dense") == "dense"
    assert run.close().dense_tiles == 2 * HEADS * 25


def test_warmup_zero_records_first_and_skips_second():
    skipped, calls = play(sampling_run(8, warmup_steps=0), 3)
    assert calls == [0, 0, 0] and skipped[0] == 0 and skipped[1] > 0


def test_a_second_forward_pass_of_the_recording_step_stays_dense():
    run, fallback = sampling_run(4), Fallback()
    forward(run, 0, fallback=fallback)
    assert fallback.calls == 0 and passes(run) == [1]
    outs = forward(run, 1, fallback=fallback)
    assert fallback.calls == 2 and passes(run) == [1]
    assert torch.allclose(outs[1], dense(*tokens(1)), atol=1e-5)


def test_a_row_that_joins_late_in_the_recording_step_finds_every_tile_active():
    run = sampling_run(4)
    forward(run, 0, rows=("positive",))
    outs = forward(run, 0, rows=("negative", "positive"))
    assert torch.allclose(outs[0], dense(*tokens(0)), atol=1e-5)
    assert passes(run) == [1]


def test_masks_age_by_forward_pass_of_their_own_row():
    run = sampling_run(4)
    play(run, 1)
    forward(run, 1, rows=("positive",))
    forward(run, 2, rows=("positive",))
    rows = next(iter(run.masks.all_masks().values()))
    assert rows["positive", 0].passes == [3] and rows["negative", 0].passes == [1]


def test_a_mask_only_shrinks(kernel):
    play(sampling_run(6, warmup_steps=1), 6)
    for row in range(2):
        for layer in range(2):
            bits = [before[row] for before in kernel.before[layer::2]]
            assert bits[0].all() and not bits[-1].all()
            assert all((later <= earlier).all() for earlier, later in zip(bits, bits[1:], strict=False))


def test_splitting_the_batch_changes_nothing():
    joined, split = sampling_run(4), sampling_run(4)
    for step in range(4):
        both = forward(joined, step)
        q, k, v = tokens(step)
        halves = [[], []]
        for i, row in enumerate(("negative", "positive")):
            forward_pass = split.forward_pass(model="m", rows=[(row, 0)], video_tokens=N)
            for layer in LAYERS:
                part = [x[i:i + 1] for x in (q, k, v)]
                call = AttentionCall.from_hook(*part, HEADS)
                halves[i].append(forward_pass.attend(call, layer, lambda p=part: dense(*p)))
        for layer in range(2):
            assert torch.equal(both[layer], torch.cat([halves[0][layer], halves[1][layer]]))
        joined.end_step(step)
        split.end_step(step)


def test_several_attentions_of_one_block_have_masks_of_their_own():
    run = sampling_run(4)
    play(run, 3, layers=[LAYERS[0], LAYERS[0], LAYERS[1]])
    assert sorted(key.name for key in run.masks.all_masks()) == ["double 0", "double 0 #2", "double 1"]
    assert passes(run) == [3]


def test_an_attention_that_stays_dense_in_one_pass_does_not_hand_its_mask_to_the_next_one():
    run = sampling_run(4)
    q, k, v = tokens(0)
    for step in range(3):
        forward_pass = run.forward_pass(model="m", rows=(1, 2), video_tokens=N)
        for masked in (step == 1, False):
            call = AttentionCall.from_hook(q, k, v, HEADS, torch.zeros(N, N) if masked else None)
            forward_pass.attend(call, LAYERS[0], lambda: dense(q, k, v))
        run.end_step(step)
    assert {key.ordinal: {int(mask.passes[0]) for mask in rows.values()}
            for key, rows in run.masks.all_masks().items()} == {0: {2}, 1: {3}}
    (reason, calls), = run.close().dense_calls.items()
    assert (reason.text, calls) == ("attention mask given", 1)


def test_cross_attention_between_self_attentions_does_not_move_their_masks():
    run = sampling_run(4)
    q, k, v = tokens(0)
    for step in range(3):
        forward_pass = run.forward_pass(model="m", rows=(1, 2), video_tokens=N)
        for keys in (77, N) if step % 2 else (N, 77):
            call = AttentionCall.from_hook(q, k[:, :keys], v[:, :keys], HEADS)
            forward_pass.attend(call, LAYERS[0], lambda: q)
        run.end_step(step)
    assert passes(run) == [3] and len(run.masks.all_masks()) == 1
    assert run.close().dense_calls == {reasons.CROSS_ATTENTION: 3}


def test_extra_tokens_are_protected():
    run = sampling_run(4, rule=Threshold(-0.5))
    play(run, 4, video_tokens=N - 10)
    for bits in masks(run).values():
        assert bits[..., 0].all() and bits[..., -1].all() and bits[..., 0, :].all() and bits[..., -1, :].all()
        assert not bits.all(), "tiles of the video do drop"


def test_a_size_that_changes_inside_a_run_is_one_note_however_often(caplog):
    run = sampling_run(12, warmup_steps=0)
    layers = [LayerId("double", i, 40) for i in range(40)]
    for step in range(4):
        n = (N, 512)[step % 2]
        outs = forward(run, step, layers=layers, n=n, video_tokens=n)
        assert torch.allclose(outs[0], dense(*tokens(step, n)), atol=1e-5), "every tile"
        run.end_step(step)
    assert run.close().notes == ["40 layers: q, k, v changed their size or dtype in mid-run; the masks started anew"]
    assert caplog.text.count("changed their size") == 1


def test_no_memory_for_masks_is_one_note_however_many_layers(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("mask")

    monkeypatch.setattr(SkipMask, "full", full)
    run = sampling_run(4)
    assert play(run, 3)[1] == [2, 2, 2]
    summary = run.close()
    assert summary.notes == ["2 layers: no memory for the skip mask; the layer stays dense"]
    assert summary.headline() == "off: no memory for the skip mask"
