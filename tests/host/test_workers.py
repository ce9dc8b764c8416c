"""ComfyUI's multi-GPU workers: conditionings evaluated at the same time, in threads, each by its own network."""

import threading

import comfy.model_management
import comfy.samplers
import pytest
import torch
from host_kit import LAYERS, Kit, dense_calls

from liteattention.runtime import RunHandle, compute

multigpu = pytest.importorskip("comfy.multigpu", reason="this ComfyUI has no multi-GPU workers")
SECOND = torch.device("cpu", 0)
"""The CPU under another name: ComfyUI sees two devices, the tensors are where they are."""


@pytest.fixture(scope="module")
def other(model_folder):
    """The same model once more, as ComfyUI loads it for a second device."""
    return Kit(model_folder).model


@pytest.fixture
def workers(other):
    """Makes a patched model run like with *MultiGPU CFG Split*: two networks, each in a thread."""

    def spread(model):
        second = other.clone()
        second.load_device, second.is_multigpu_base_clone = SECOND, True
        spread_model = model.clone()
        spread_model.set_additional_models("multigpu", [second])
        return spread_model

    return spread


def test_workers_share_a_run_and_no_mask(kit, workers, runs, monkeypatch):
    """Split by conditioning the run gives what it gives in one thread; masks are made in the workers."""
    attention, threads = compute.lite_attention, set()

    def watched(*args, **kwargs):
        threads.add(threading.current_thread())
        assert not torch.is_inference_mode_enabled()
        return attention(*args, **kwargs)

    together = kit.sample(kit.lite(), batch=2)
    monkeypatch.setattr(compute, "lite_attention", watched)
    handle = RunHandle()
    apart = kit.sample(workers(kit.lite(handle=handle)), batch=2)
    assert len(threads) == 2 and threading.main_thread() not in threads
    assert (apart - together).abs().max() < 1e-4
    summary = handle.summary
    assert summary.forward_passes == 2 * 4 and summary.sparse_calls == 2 * 4 * LAYERS and summary.skipped > 0
    assert dense_calls(summary) == {"cross-attention": summary.sparse_calls} and not summary.notes
    assert set(runs[1].passes.values()) == {4} and len({key.model for key, _ in runs[1].passes}) == 2

    def by_row(run):
        return {(key.name, *row[1:]): bits for (key, row), bits in run.bits.items()}

    one, many = by_row(runs[0]), by_row(runs[1])
    assert one.keys() == many.keys() and len(one) == 4 * LAYERS
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert summary.skipped == pytest.approx(runs[0].close().skipped, abs=1e-9)


def test_every_device_is_asked_for_its_backend_before_the_first_step_and_not_in_a_thread(kit, workers, monkeypatch):
    asked, steps, ask = [], [], compute.resolve_backend

    def watched(device, *args):
        asked.append((device, threading.current_thread(), len(steps)))
        return ask(device, *args)

    monkeypatch.setattr(compute, "resolve_backend", watched)
    kit.sample(workers(kit.lite()), steps=2, callback=lambda step, *args: steps.append(step))
    assert asked == [(torch.device("cpu"), threading.main_thread(), 0), (SECOND, threading.main_thread(), 0)]


def test_a_prompt_that_moves_to_another_device_starts_anew_there_and_says_so(kit, workers, runs):
    """A second negative prompt begins in mid-run, and the first one goes over to the device of the positive one."""
    tokens = kit.negative[0][0]
    later = [tokens * 0.5, {"start_percent": 0.5, "end_percent": 1.0}]
    handle = RunHandle()
    kit.sample(workers(kit.lite(handle=handle)), negative=[*kit.negative, later])
    assert [note for note in handle.summary.notes if "moved to another GPU" in note] == handle.summary.notes != []
    assert dense_calls(handle.summary) == {"cross-attention": handle.summary.sparse_calls}
    passes = {}
    for (key, row), count in runs[0].passes.items():
        passes.setdefault(row, {})[key.model] = count
    assert sorted(sorted(counts.values()) for counts in passes.values()) == [[2], [2, 2], [4]]


def test_tiles_of_an_evaluation_have_masks_of_their_own_on_every_device(kit, workers, runs):
    """Of a node that evaluates them one by one. ComfyUI gives every device a copy of the noise level at each call."""
    def by_tiles(args):
        out = [torch.zeros_like(args["input"]) for _ in args["conds"]]
        for tile in ((..., slice(0, 12)), (..., slice(12, 24))):
            parts = comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"][tile], args["sigma"],
                                                   args["model_options"])
            for whole, part in zip(out, parts, strict=True):
                whole[tile] = part
        return out

    def tiled(model):
        patched = model.clone()
        patched.model_options["sampler_calc_cond_batch_function"] = by_tiles
        return patched

    size = (7, 20, 24)
    together, apart = (kit.sample(tiled(model), size=size) for model in (kit.lite(), workers(kit.lite())))
    assert (apart - together).abs().max() < 1e-4
    for run in runs:
        assert len(run.passes) == 2 * 2 * LAYERS and set(run.passes.values()) == {4}


def test_an_interrupt_in_a_worker_ends_the_run_clean(kit, workers, runs):
    alone = kit.sample(kit.lite())
    calls = []

    def stopping(func, *args, **kwargs):
        calls.append(1)
        if len(calls) == 25:
            raise comfy.model_management.InterruptProcessingException()
        return func(*args, **kwargs)

    base = kit.model.clone()
    base.model_options["transformer_options"]["optimized_attention_override"] = stopping
    model = kit.lite(base)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        kit.sample(workers(model))
    assert not runs[-1].masks.all_masks() and runs[-1].close().steps_done == 2
    assert torch.equal(kit.sample(model), alone)
