"""Runs that end early, runs in a row, memory that is gone afterwards."""

import gc
import weakref

import comfy.model_management
import pytest
import torch
from host_kit import LAYERS, dense_calls

from liteattention.kernels import SkipMask
from liteattention.runtime import RunHandle, compute


@pytest.fixture
def words(monkeypatch):
    """Weak references to the words of every mask made from here on."""
    made = []
    full = SkipMask.full

    def watched(*args, **kwargs):
        mask = full(*args, **kwargs)
        made.append(weakref.ref(mask.words))
        return mask

    monkeypatch.setattr(SkipMask, "full", watched)
    return made


def all_gone(words):
    gc.collect()
    return words and all(w() is None for w in words)


def raising(error, at):
    """An attention override that raises at its n-th call."""
    calls = []

    def override(func, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return func(*args, **kwargs)

    return override


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException(),
                                   torch.OutOfMemoryError("no memory"), RuntimeError("a bug in a model")],
                         ids=["interrupt", "oom", "bug"])
def test_a_run_cut_short_leaves_nothing_and_the_next_is_as_if_alone(kit, runs, words, error):
    alone = kit.sample(kit.lite())
    handle = RunHandle()
    base = kit.model.clone()
    # Cross-attention reaches the override below ours: 12 is in the middle of the third forward pass.
    base.model_options["transformer_options"]["optimized_attention_override"] = raising(error, 12)
    model = kit.lite(base, handle)
    with pytest.raises(type(error)):
        kit.sample(model)
    assert 0 < handle.summary.steps_done < 4, "the account of what ran is there"
    assert all_gone(words) and not runs[-1].masks.all_masks()
    assert torch.equal(kit.sample(model), alone), "the same patched model, the next prompt"
    assert all_gone(words)


def test_interrupt_from_the_callback(kit, runs, words):
    def stop(step, *args):
        if step == 1:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    model = kit.lite()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        kit.sample(model, callback=stop)
    assert all_gone(words) and runs[0].close().steps_done == 2


def test_out_of_memory_inside_the_kernel_is_raised_and_cleaned_up(kit, words, monkeypatch):
    alone = kit.sample(kit.lite())
    attention = compute.lite_attention
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) in (8, 9):  # the second time without stand-ins
            raise torch.OutOfMemoryError("no memory for the output")
        return attention(*args, **kwargs)

    monkeypatch.setattr(compute, "lite_attention", failing)
    model = kit.lite()
    with pytest.raises(torch.OutOfMemoryError):
        kit.sample(model)
    assert all_gone(words)
    assert torch.equal(kit.sample(model), alone)


@pytest.mark.parametrize("where", ["prepare_sampling", "on_load"])
def test_out_of_memory_while_the_model_loads(kit, runs, where):
    """ComfyUI calls no clean-up callback then; the run is closed all the same."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    def load(*args, **kwargs):
        raise torch.OutOfMemoryError("loading")

    model = kit.lite()
    broken = model.clone()
    if where == "on_load":
        broken.add_callback_with_key(CallbacksMP.ON_LOAD, "test", load)
        comfy.model_management.unload_all_models()
    else:
        broken.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", load)
    with pytest.raises(torch.OutOfMemoryError):
        kit.sample(broken)
    assert len(runs) == 1 and runs[0]._summary is not None and runs[0]._summary.steps_done == 0
    comfy.model_management.unload_all_models()
    assert torch.isfinite(kit.sample(model)).all() and len(runs) == 2


def test_a_kernel_failure_does_not_end_the_render(kit, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    handle = RunHandle()
    model = kit.lite(handle=handle)
    with monkeypatch.context() as patch:
        patch.setattr(compute, "lite_attention", failing)
        out = kit.sample(model)
    assert torch.equal(out, kit.sample(kit.model)), "the attention that was there before did everything"
    assert dense_calls(handle.summary)["the kernel failed in this run"] == 4 * LAYERS
    assert caplog.text.count("no kernel image is available") == 1
    kit.sample(model)
    assert handle.summary.sparse_calls == 4 * LAYERS, "the next run tries again"


def test_a_kernel_that_fails_in_mid_run_hands_over_at_that_very_call(kit, monkeypatch):
    """From there on the run is what the attention patched before makes of it, bit by bit."""
    attention, taken = compute.lite_attention, []

    def failing(*args, **kwargs):
        taken.append(1)
        if len(taken) == 12:
            raise RuntimeError("an illegal instruction was encountered")
        return attention(*args, **kwargs)

    handle = RunHandle()
    model = kit.lite(handle=handle)
    with monkeypatch.context() as patch:
        patch.setattr(compute, "lite_attention", failing)
        out = kit.sample(model)
    summary = handle.summary
    assert len(taken) == 12 and summary.sparse_calls == 11
    assert dense_calls(summary) == {"cross-attention": 4 * LAYERS, "the kernel failed in this run": 4 * LAYERS - 11}
    assert len(summary.notes) == 1 and "RuntimeError: an illegal instruction" in summary.notes[0]

    ours, calls = model.model_options["transformer_options"]["optimized_attention_override"], []

    def until_then(func, q, k, *args, **kwargs):
        calls.append(q.shape == k.shape)
        return (func if calls[-1] and sum(calls) > 11 else lambda *a, **b: ours(func, *a, **b))(q, k, *args, **kwargs)

    expected = model.clone()
    expected.model_options["transformer_options"]["optimized_attention_override"] = until_then
    assert torch.equal(out, kit.sample(expected)) and not torch.equal(out, kit.sample(model))


def test_no_memory_for_masks(kit, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("mask")

    monkeypatch.setattr(SkipMask, "full", full)
    handle = RunHandle()
    assert torch.equal(kit.sample(kit.lite(handle=handle)), kit.sample(kit.model))
    assert dense_calls(handle.summary)["no memory for the skip mask"] == 4 * LAYERS


def test_two_prompts_in_a_row_are_each_as_if_alone(kit, words):
    one, two = kit.lite(), kit.lite()
    first = kit.sample(one, seed=1)
    second = kit.sample(two, seed=2)
    assert torch.equal(kit.sample(one, seed=2), second), "a cached model starts afresh"
    assert torch.equal(kit.sample(two, seed=1), first)
    assert all_gone(words)


def test_a_reused_guider_starts_afresh(kit, runs):
    """Its uuids stay the same from run to run."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider, RandomNoise, SamplerCustomAdvanced

    model = kit.lite()
    guider = CFGGuider.execute(model, kit.positive, kit.negative, 2.0).args[0]
    sigmas = BasicScheduler.execute(model, "simple", 4, 1.0).args[0]
    options = guider.model_options
    before = repr(options)
    results = []
    for _ in range(2):
        with torch.inference_mode():
            results.append(SamplerCustomAdvanced.execute(
                RandomNoise.execute(1).args[0], guider, comfy.samplers.sampler_object("euler"), sigmas,
                {"samples": kit.latent()}).args[0]["samples"])
    assert torch.equal(*results)
    assert [set(s.passes.values()) for s in runs] == [{4}, {4}]
    assert guider.model_options is options and repr(options) == before, "nothing of the run stays in the guider"
