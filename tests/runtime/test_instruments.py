"""Error budget, refresh and stand-ins: what reaches the kernel, what is counted, what the receipt says."""

import math

import pytest
import torch
from run_kit import HEADS, LAYERS, N, Previous, forward, session

from liteattention.kernels import SkipMask, UnsupportedAttention
from liteattention.runtime import evaluation


@pytest.fixture
def seen(monkeypatch):
    """Keyword arguments of every call of the kernel, with the masks' active tiles before and after it."""
    calls = []
    attention = evaluation.lite_attention

    def watched(q, k, v, masks, **kwargs):
        before = [mask.to_bool() for mask in masks]
        out = attention(q, k, v, masks, **kwargs)
        calls.append({**kwargs, "before": before, "after": [mask.to_bool() for mask in masks]})
        return out

    monkeypatch.setattr(evaluation, "lite_attention", watched)
    return calls


def play(run, steps=6, **kwargs):
    for step in range(run.step, run.step + steps):
        forward(run, step, **kwargs)
        run.end_step(step)


def test_an_error_budget_takes_the_place_of_the_threshold(seen):
    run = session(total=6, error_budget=0.1)
    play(run)
    assert {call["criterion"] for call in seen} == {"mass"}
    assert {call["threshold"] for call in seen} == {math.log2(0.1 / 5)}, "640 keys are five tiles"
    receipt = run.close()
    assert receipt.skipped > 0 and "error_budget 0.1" in receipt.text() and "threshold -4" not in receipt.text()


def test_without_a_budget_the_threshold_decides(seen):
    run = session(total=6)
    play(run, 3)
    assert {(call["criterion"], call["threshold"]) for call in seen} == {("max", -4.0)}
    assert "threshold -4" in run.close().text()


@pytest.mark.parametrize("on", [True, False])
def test_stand_in_reaches_every_call(seen, on):
    play(session(total=6, pool_skipped=on), 3)
    assert len(seen) == 6 and {call["pool_skipped"] for call in seen} == {on}


def out_of_memory(monkeypatch, needs):
    attention, tries = evaluation.lite_attention, []

    def failing(*args, **kwargs):
        tries.append((kwargs["precision"], kwargs["pool_skipped"]))
        if needs(kwargs):
            raise torch.OutOfMemoryError("summaries")
        return attention(*args, **kwargs)

    monkeypatch.setattr(evaluation, "lite_attention", failing)
    return tries


def test_no_memory_for_stand_ins_does_without_them_and_says_so_once(monkeypatch):
    tries = out_of_memory(monkeypatch, lambda kwargs: kwargs["pool_skipped"])
    run, previous = session(total=6), Previous()
    play(run, 3, previous=previous)
    assert tries == [("full", True)] + [("full", False)] * 6 and previous.calls == 0
    receipt = run.close()
    assert receipt.taken == 6 and len(receipt.notes) == 1 and "pool_skipped is off" in receipt.notes[0]


def test_two_devices_that_run_out_of_memory_at_once_give_up_one_thing():
    run = session(total=6)
    assert run.do_without("int8", True) and run.do_without("int8", True) and run.pool_skipped
    assert run.do_without("full", True) and not run.pool_skipped and not run.do_without("full", False)


def test_refresh_gives_every_query_tile_its_turn(seen):
    every = 3
    run = session(total=8, refresh_every=every, threshold=-2.0)
    play(run, 1)
    assert all(before.all() for call in seen for before in call["before"])
    shrunk = {key: {name: mask.to_bool() for name, mask in rows.items()}
              for key, rows in run.masks.all_masks().items()}
    seen.clear()
    play(run, every)
    assert not any(call["skip_now"] for call in seen)
    for i in range(len(LAYERS)):
        opened = [{t for t in range(5) if call["before"][0][:, :, t].all()} for call in seen[i::len(LAYERS)]]
        for turn, tiles in enumerate(opened, 1):
            assert set(range(turn % every, 5, every)) <= tiles
    assert not all(bits.all() for rows in shrunk.values() for bits in rows.values()), "or the test shows nothing"


def test_refresh_counts_what_was_dropped_and_what_came_back(seen):
    run = session(total=10, refresh_every=2, threshold=-2.0)
    dropped = back = 0
    last = {}
    for _ in range(8):
        seen.clear()
        play(run, 1)
        for layer, call in enumerate(seen):
            for row in range(2):
                if (layer, row) in last:
                    reopened = ~last[layer, row] & call["before"][row]
                    dropped += int(reopened.sum())
                    back += int((reopened & call["after"][row]).sum())
                last[layer, row] = call["after"][row]
    receipt = run.close()
    assert (receipt.refreshed, receipt.came_back) == (dropped, back) and 0 < back < dropped
    assert receipt.to_dict()["wrong_drop_rate"] == receipt.wrong_drop_rate == back / dropped
    assert f"refresh: {back / dropped:.1%} of {dropped} skipped tiles came back" in receipt.text()


def test_without_refresh_nothing_is_opened_or_told(seen):
    run = session(total=6)
    play(run)
    for row in range(2):
        for layer in range(2):
            bits = [call["before"][row] for call in seen[layer::2]]
            assert all((later <= earlier).all() for earlier, later in zip(bits, bits[1:], strict=False))
    receipt = run.close()
    assert receipt.wrong_drop_rate is None and "refresh" not in receipt.text()


def test_refresh_opens_nothing_in_warmup_and_in_layers_that_are_left(monkeypatch):
    opened, reopen = [], SkipMask.reopen
    monkeypatch.setattr(SkipMask, "reopen", lambda mask, *args: opened.append(args) or reopen(mask, *args))
    run = session(total=12, refresh_every=2)
    play(run, 2)
    assert not opened, "warm-up and recording step"
    play(run, 1)
    assert opened == [(2, 1)] * 4
    run.dispatcher.prefers_previous = lambda *args: True
    play(run, 1)
    assert len(opened) == 4


def test_a_late_row_next_to_a_refreshed_one_computes_all_it_drops(seen):
    run = session(total=6, refresh_every=2)
    play(run, 1, rows=("positive",))
    assert all(call["skip_now"] for call in seen)
    seen.clear()
    play(run, 1)
    assert not any(call["skip_now"] for call in seen)


@pytest.mark.parametrize("error", [UnsupportedAttention("q", 1, "2", "not today"), RuntimeError("no kernel image"),
                                   torch.OutOfMemoryError("out")], ids=["unsupported", "failed", "oom"])
def test_a_call_that_fails_is_not_in_the_refresh_account(monkeypatch, error):
    run = session(total=6, refresh_every=2, threshold=-2.0)
    play(run, 3)
    before = {key: {name: mask.to_bool() for name, mask in rows.items()}
              for key, rows in run.masks.all_masks().items()}
    counted = run.statistics.refreshed, run.statistics.came_back

    def failing(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "lite_attention", failing)
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                forward(run, 3)
        else:
            forward(run, 3)
        run.end_step(3)
    assert (run.statistics.refreshed, run.statistics.came_back) == counted
    after = run.masks.all_masks()
    if isinstance(error, UnsupportedAttention):
        assert all(torch.equal(mask.to_bool(), before[key][name])
                   for key, rows in after.items() for name, mask in rows.items()), "as if it had not been opened"
    receipt = run.close()
    assert 0 <= receipt.came_back <= receipt.refreshed


def test_refresh_keeps_what_must_stay():
    run = session(total=6, refresh_every=2, threshold=-0.5)
    play(run, 6, latent_tokens=N - 10)
    for rows in run.masks.all_masks().values():
        for mask in rows.values():
            bits = mask.to_bool()
            assert bits[..., 0].all() and bits[..., -1].all() and bits[..., 0, :].all() and bits[..., -1, :].all()
    receipt = run.close()
    assert receipt.refreshed > 0 and receipt.tiles_total == 6 * 2 * 2 * HEADS * 25
