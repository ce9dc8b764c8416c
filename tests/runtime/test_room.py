"""Memory manners: what the masks will take is told before, declined where it does not fit, and gone afterwards."""

import gc
import logging
import tracemalloc

import torch
from run_kit import HEADS, N, Previous, dense, forward, tokens

from liteattention.kernels import SkipMask, mask_nbytes
from liteattention.runtime import AttentionCall, LayerId, LiteAttentionConfig, Session, parse_blocks, policy
from liteattention.runtime.room import Room
from liteattention.runtime.state import MB, LayerKey, MaskTable

CPU = torch.device("cpu")
ONE = mask_nbytes(1, HEADS, N, N)
WAN = LayerId("double", 3, 40)


def session(free, total=4, **settings):
    config = LiteAttentionConfig(**{"threshold": -4.0, "min_tokens": 128, "warmup_steps": 0, **settings})
    return Session(config, total, free_memory=lambda device: free)


def room(free, limit_mb=512, blocks="", notes=None):
    return Room(MaskTable(limit_mb * MB), parse_blocks(blocks), free, (notes if notes is not None else []).append)


def ask(wanted, rows=("p",), layer=WAN, device=CPU, ordinal=0):
    return wanted.reason(LayerKey("m", device, str(layer), ordinal), layer, rows, 40, 75_600)


def test_the_size_is_in_the_log_before_the_first_mask_is_made(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "LiteAttention")
    full = SkipMask.full

    def watched(*args, **kwargs):
        assert "skip masks take up to" in caplog.text
        return full(*args, **kwargs)

    monkeypatch.setattr(SkipMask, "full", watched)
    run = session(None)
    for step in range(2):
        forward(run, step)
        run.end_step(step)
    assert caplog.text.count("skip masks take up to") == 1
    assert f"(2 x double, {HEADS} heads x {N} tokens)" in caplog.text
    assert run.masks.nbytes == 2 * 2 * ONE, "as said: two layers, for each of two prompts"
    caplog.clear()
    ask(room(None, blocks="0-1, -1"))
    assert "take up to 63.4 MB per prompt (37 x double, 40 heads x 75600 tokens)" in caplog.text


def test_a_run_that_would_not_fit_is_declined_with_advice_and_makes_no_mask(monkeypatch):
    def none(*args, **kwargs):
        raise AssertionError("a mask was made")

    monkeypatch.setattr(SkipMask, "full", none)
    run, previous = session(4 * ONE - 1), Previous()
    for step in range(3):
        outs = forward(run, step, previous=previous)
        assert all(torch.equal(out, dense(*tokens(step))) for out in outs)
        run.end_step(step)
    receipt = run.close()
    assert receipt.left == {policy.NO_ROOM: 6} and previous.calls == 6 and len(receipt.notes) == 1
    assert "the skip masks need 0.2 KB more, cpu has 0.2 KB free" in receipt.text()
    assert "Make the video shorter or smaller, or free some memory." in receipt.text()
    monkeypatch.undo()
    run = session(4 * ONE)
    forward(run, 0)
    assert run.close().taken == 2


def test_the_advice_names_a_limit_that_fits():
    notes = []
    assert ask(room(lambda device: 60 * MB, notes=notes)) == policy.NO_ROOM
    assert "need 68.5 MB more, cpu has 60.0 MB free" in notes[0] and "set max_state_mb to 60 or less" in notes[0]
    assert ask(room(lambda device: 60 * MB, limit_mb=60, notes=notes)) is None and len(notes) == 1


def test_rows_that_come_later_are_asked_for_alone():
    free = {"now": 70 * MB}
    wanted = room(lambda device: free["now"])
    assert ask(wanted, ["p"]) is None
    assert ask(wanted, ["p", "n"]) == policy.NO_ROOM, "what is promised is not free any more"
    assert ask(wanted, ["p"]) is None, "the first one goes on"
    free["now"] = 500 * MB
    assert ask(wanted, ["n"]) == policy.NO_ROOM, "not asked again"
    assert ask(wanted, ["q"]) is None
    assert ask(wanted, ["p"], layer=LayerId("single", 0, 40)) is None
    free["now"] = 4 * 69 * MB
    assert ask(wanted, ["p"], ordinal=1) is None and ask(wanted, ["q"], ordinal=1) == policy.NO_ROOM
    assert ask(wanted, ["q"], device=torch.device("cuda", 1)) is None, "each device has its own memory"


def test_free_memory_that_is_not_known_declines_nothing():
    def broken(device):
        raise RuntimeError("no driver")

    for free in (None, lambda device: None, broken):
        assert ask(room(free)) is None


def test_a_layer_without_memory_is_not_tried_again(monkeypatch):
    tries = []

    def full(*args, **kwargs):
        tries.append(1)
        raise torch.OutOfMemoryError("mask")

    monkeypatch.setattr(SkipMask, "full", full)
    run = session(None)
    for step in range(3):
        forward(run, step)
        run.end_step(step)
    receipt = run.close()
    assert len(tries) == 2 and receipt.left == {policy.NO_MEMORY: 6} and len(receipt.notes) == 2


def test_nothing_outlives_a_run():
    """As many tensors as before after every 40 runs, and no more memory than 40 runs earlier."""
    x = torch.randn(1, 130, 64)

    def play(number):
        run = session(10**9, refresh_every=number % 3)
        for step in range(2):
            context = run.evaluation(model="m", rows=["p"], latent_tokens=130)
            for index in range(2):
                context.attend(AttentionCall.from_hook(x, x, x, 1), LayerId("double", index, 2), lambda: None)
            run.end_step(step)
        if number % 2:
            handed = run.keep_masks()[0]
            Session(run.config, 4, kept=handed).close()
        return run.close().taken

    def tensors():
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    logging.disable(logging.CRITICAL)  # pytest keeps every record
    tracemalloc.start()
    try:
        for number in range(10):
            assert play(number) == 4
        before, memory = tensors(), [tracemalloc.get_traced_memory()[0]]
        for _ in range(4):
            for number in range(40):
                play(number)
            assert tensors() == before
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    # Interpreter and torch keep small objects for reuse, now more and now fewer; a leak shows in every window.
    grown = min(after - at for at, after in zip(memory, memory[1:], strict=False))
    assert grown < 4 * 2**10, f"{memory} bytes after every 40 runs"
