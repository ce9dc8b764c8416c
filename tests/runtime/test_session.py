"""A run without ComfyUI: what is taken, left, recorded, counted and freed."""

import gc
import weakref

import pytest
import torch
from run_kit import HEADS, LAYERS, N, Previous, dense, forward, session, tokens

from liteattention.kernels import BackendChoice, SkipMask
from liteattention.runtime import AttentionCall, evaluation, policy
from liteattention.runtime import session as session_module


def passes(run):
    return sorted({mask.passes[0] for rows in run.masks.all_masks().values() for mask in rows.values()})


def test_a_run_warms_up_records_skips_and_accounts_for_every_call():
    run, previous = session(total=12), Previous()
    for step in range(8):
        outs = forward(run, step, previous=previous)
        for out in outs:
            assert torch.allclose(out, dense(*tokens(step)), atol=0.2)
        if step < 2:
            assert torch.allclose(outs[0], dense(*tokens(step)), atol=1e-5), "warm-up computes every tile"
        report = run.end_step(step)
        assert report.step == step + 1 and report.state_bytes == run.masks.nbytes
        assert (report.skipped > 0) == (step >= 2)
    receipt = run.close()
    assert previous.calls == 2, "only the first of two warm-up steps goes to the previous attention"
    assert receipt.taken == 14 and receipt.left == {"warm-up step": 2}
    assert receipt.evaluations == 8 and receipt.steps_done == 8
    assert receipt.skipped_per_step[:2] == [0, 0]
    assert receipt.skipped_per_step[2:] == sorted(receipt.skipped_per_step[2:]), "the mask only shrinks"
    assert receipt.tiles_total == 8 * 2 * 2 * HEADS * 25
    assert receipt.skipped == pytest.approx(sum(receipt.skipped_per_step) / 8)
    assert "14 of 16 attention calls taken" in receipt.text() and "2 warm-up step" in receipt.text()


def test_warmup_zero_records_first_and_skips_second():
    run, previous = session(warmup_steps=0), Previous()
    shares = []
    for step in range(3):
        forward(run, step, previous=previous)
        shares.append(run.end_step(step).skipped)
    assert previous.calls == 0 and shares[0] == 0 and shares[1] > 0


def test_a_second_evaluation_of_the_recording_step_stays_dense():
    run, previous = session(total=4), Previous()
    forward(run, 0, previous=previous)
    assert previous.calls == 0 and passes(run) == [1]
    outs = forward(run, 1, previous=previous)
    assert previous.calls == 2 and passes(run) == [1]
    assert torch.allclose(outs[1], dense(*tokens(1)), atol=1e-5)


def test_a_row_that_joins_late_in_the_recording_step_finds_every_tile_active():
    run = session(total=4)
    forward(run, 0, rows=("positive",))
    outs = forward(run, 0, rows=("negative", "positive"))
    assert torch.allclose(outs[0], dense(*tokens(0)), atol=1e-5)
    assert passes(run) == [1]


def test_masks_age_by_evaluation_of_their_own_row():
    run = session(total=4)
    forward(run, 0)
    run.end_step(0)
    forward(run, 1, rows=("positive",))
    forward(run, 2, rows=("positive",))
    masks = next(iter(run.masks.all_masks().values()))
    assert masks[("positive", 0)].passes == [3] and masks[("negative", 0)].passes == [1]


def test_splitting_the_batch_changes_nothing():
    joined, split = session(total=4), session(total=4)
    for step in range(4):
        both = forward(joined, step)
        q, k, v = tokens(step)
        halves = [[], []]
        for i, row in enumerate(("negative", "positive")):
            context = split.evaluation(model="m", rows=[(row, 0)], latent_tokens=N)
            for layer in LAYERS:
                part = [x[i:i + 1] for x in (q, k, v)]
                halves[i].append(context.attend(AttentionCall.from_hook(*part, HEADS), layer, lambda p=part: dense(*p)))
        for layer in range(2):
            assert torch.equal(both[layer], torch.cat([halves[0][layer], halves[1][layer]]))
        joined.end_step(step)
        split.end_step(step)


@pytest.mark.parametrize("settings, kwargs, reason", [
    ({"dense_blocks": "0--1"}, {}, policy.DENSE_BLOCK),
    ({"dense_end_steps": 100}, {}, "dense end step"),
    ({}, {"leave": policy.EXTRA_PASS}, policy.EXTRA_PASS),
    ({}, {"rows": ("only",) * 1, "layers": [None, None]}, policy.NO_LAYER),
    ({}, {"latent_tokens": None}, policy.NO_LAYOUT),
    ({}, {"latent_tokens": N + 1}, policy.NOT_VIDEO),
    ({}, {"latent_tokens": 100}, policy.MOSTLY_EXTRA),
    ({"min_tokens": 641}, {}, "fewer than 641 tokens"),
])
def test_what_is_left_goes_to_the_previous_attention_bit_for_bit(settings, kwargs, reason):
    run, previous = session(total=4, **settings), Previous()
    outs = forward(run, 0, previous=previous, **kwargs)
    rows = len(kwargs.get("rows", (1, 2)))
    expected = dense(*(x[:rows] for x in tokens(0)))
    assert all(torch.equal(out, expected) for out in outs)
    assert run.close().left == {reason: 2} and previous.calls == 2 and not run.masks.all_masks()


def test_rows_without_identity_are_left():
    run = session(total=4)
    context = run.evaluation(model="m", rows=None, latent_tokens=N)
    q, k, v = tokens(0)
    context.attend(AttentionCall.from_hook(q, k, v, HEADS), LAYERS[0], lambda: dense(q, k, v))
    assert run.close().left == {policy.NO_ROWS: 1}


def test_several_attentions_of_one_block_have_masks_of_their_own():
    run = session(total=4)
    for step in range(3):
        forward(run, step, layers=[LAYERS[0], LAYERS[0], LAYERS[1]])
        run.end_step(step)
    assert sorted((k.name, k.ordinal) for k in run.masks.all_masks()) == [("double 0", 0), ("double 0", 1),
                                                                          ("double 1", 0)]
    assert passes(run) == [3]


@pytest.mark.parametrize("wanted", [True, False])
def test_stand_ins_that_fail_on_a_gpu_are_done_without(monkeypatch, wanted):
    choice = BackendChoice("torch", True, "the self-test ended with signal 6", pool_skipped=False)
    monkeypatch.setattr(session_module, "resolve_backend", lambda device: choice)
    run, plain = session(total=4, pool_skipped=wanted), session(total=4, pool_skipped=False)
    for step in range(3):
        assert all(map(torch.equal, forward(run, step), forward(plain, step)))
        run.end_step(step)
        plain.end_step(step)
    assert run.close().notes == wanted * ["pool_skipped is off on cpu. the self-test ended with signal 6"]


def test_an_attention_that_is_left_in_one_pass_does_not_hand_its_mask_to_the_next_one():
    run = session(total=4)
    q, k, v = tokens(0)
    for step in range(3):
        context = run.evaluation(model="m", rows=(1, 2), latent_tokens=N)
        for masked in (step == 1, False):
            call = AttentionCall.from_hook(q, k, v, HEADS, torch.zeros(N, N) if masked else None)
            context.attend(call, LAYERS[0], lambda: dense(q, k, v))
        run.end_step(step)
    assert {key.ordinal: {int(mask.passes[0]) for mask in rows.values()}
            for key, rows in run.masks.all_masks().items()} == {0: {2}, 1: {3}}
    assert run.close().left == {"attention mask given": 1}


def test_extra_tokens_are_protected():
    run = session(total=4, threshold=-0.5)
    for step in range(4):
        forward(run, step, latent_tokens=N - 10)
        run.end_step(step)
    for rows in run.masks.all_masks().values():
        for mask in rows.values():
            bits = mask.to_bool()
            assert bits[..., 0].all() and bits[..., -1].all() and bits[..., 0, :].all() and bits[..., -1, :].all()
            assert not bits.all(), "tiles of the video do drop"


def test_a_step_without_attention_has_no_share_and_ages_nothing():
    run = session(total=8, warmup_steps=1)
    forward(run, 0)
    run.end_step(0)
    assert run.end_step(1).skipped is None
    forward(run, 2)
    run.end_step(2)
    assert passes(run) == [2] and run.close().skipped_per_step[1] is None


def test_a_kernel_that_fails_is_left_alone_for_the_rest_of_the_run(monkeypatch, caplog):
    run, previous = session(total=4), Previous()
    attention = evaluation.lite_attention
    tries = []

    def failing(*args, **kwargs):
        tries.append(1)
        if len(tries) == 3:
            raise RuntimeError("no kernel image")
        return attention(*args, **kwargs)

    monkeypatch.setattr(evaluation, "lite_attention", failing)
    for step in range(4):
        outs = forward(run, step, previous=previous)
        run.end_step(step)
    assert torch.equal(outs[0], dense(*tokens(3))) and len(tries) == 3
    receipt = run.close()
    assert receipt.taken == 2 and receipt.left == {policy.KERNEL_FAILED: 6}
    assert [n for n in receipt.notes if "no kernel image" in n] and len(receipt.notes) == 1
    assert caplog.text.count("no kernel image") == 1


def test_out_of_memory_for_a_mask_leaves_the_layer_dense(monkeypatch):
    run = session(total=4)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("mask")

    monkeypatch.setattr(SkipMask, "full", full)
    outs = forward(run, 0)
    assert torch.equal(outs[0], dense(*tokens(0)))
    assert run.close().left == {policy.NO_MEMORY: 2}


def test_any_other_trouble_with_a_mask_ends_no_render(monkeypatch):
    run, previous = session(total=4), Previous()

    def full(*args, **kwargs):
        raise ValueError("seqlen_k is 5000000")

    monkeypatch.setattr(SkipMask, "full", full)
    outs = forward(run, 0, previous=previous)
    assert torch.equal(outs[0], dense(*tokens(0))) and previous.calls == 2
    receipt = run.close()
    assert receipt.left == {policy.KERNEL_FAILED: 2} and "5000000" in receipt.notes[0]


def test_a_backend_that_cannot_be_asked_ends_no_render(monkeypatch):
    from liteattention.runtime import session as module

    def resolve(device):
        raise RuntimeError("CUDA driver error")

    monkeypatch.setattr(module, "resolve_backend", resolve)
    run = session(total=4)
    forward(run, 0)
    receipt = run.close()
    assert receipt.left == {policy.NO_BACKEND: 2} and "CUDA driver error" in receipt.notes[0]


def test_out_of_memory_in_the_kernel_is_the_hosts_business(monkeypatch):
    run = session(total=4)

    def attention(*args, **kwargs):
        raise torch.OutOfMemoryError("out")

    monkeypatch.setattr(evaluation, "lite_attention", attention)
    with pytest.raises(torch.OutOfMemoryError):
        forward(run, 0)
    assert not run.masks.all_masks().get(next(iter(run.masks.all_masks()), None)), "a half-written mask is not kept"


def test_closing_frees_every_tensor_and_can_be_repeated():
    run = session(total=4)
    forward(run, 0)
    masks = [weakref.ref(m.words) for rows in run.masks.all_masks().values() for m in rows.values()]
    assert len(masks) == 4
    receipt = run.close()
    gc.collect()
    assert all(m() is None for m in masks) and run.close() is receipt


def test_memory_is_freed_even_if_the_device_no_longer_answers(monkeypatch):
    run = session(total=4)
    forward(run, 0)

    def end_step(step):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(run.statistics, "end_step", end_step)
    assert run.close().taken == 2 and not run.masks.all_masks()


def test_no_calls_at_all_is_explained():
    assert "put LiteAttention last" in session().close().text()


def test_the_state_limit_names_the_layers_left_dense():
    run = session(total=8, warmup_steps=1)
    run.masks.limit_bytes = 2 * SkipMask.full(1, HEADS, N).nbytes
    for step in range(3):
        forward(run, step)
        run.end_step(step)
    receipt = run.close()
    assert len(receipt.dense_layers) == 1 and receipt.left[policy.OVER_STATE_LIMIT] == 2
    assert receipt.dense_layers[0] in receipt.text()


def test_a_gpu_without_triton_keeps_its_attention_and_one_line_says_what_to_install(monkeypatch, caplog):
    from liteattention.kernels import BackendChoice
    from liteattention.runtime import session as module

    hint = "Triton is not installed; for torch 2.11 on Windows run: python -m pip install triton-windows"
    monkeypatch.setattr(module, "resolve_backend", lambda device: BackendChoice("torch", False, hint))
    run = session()
    assert [run.backend(torch.device("cuda", i)) for i in (0, 0, 0)] == [None] * 3
    assert caplog.text.count(hint) == 1 and hint in run.close().notes[0]
    monkeypatch.setattr(module, "resolve_backend", lambda device: BackendChoice("torch", True))
    assert session().backend(torch.device("cuda")) == "torch", "unless it was asked for by name"


def test_a_wrong_environment_variable_is_a_line_and_not_the_end(monkeypatch):
    monkeypatch.setenv("LITEATTENTION_BACKEND", "tritn")
    run, previous = session(total=4), Previous()
    forward(run, 0, previous=previous)
    receipt = run.close()
    assert previous.calls == 2 and receipt.left == {policy.NO_BACKEND: 2}
    assert "LITEATTENTION_BACKEND is 'tritn'; allowed: auto, triton, torch" in receipt.text()


def test_wan_14b_720p_state_fits_75_mb_per_row():
    from liteattention.kernels import mask_nbytes

    assert 40 * mask_nbytes(1, 40, 75_600, 75_600) <= 75e6
