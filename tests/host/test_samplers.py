"""Samplers and sampler nodes: every attention call accounted for, masks aged by evaluation, callbacks untouched."""

import pytest
import torch
from host_kit import LAYERS, count_backend_calls, dense_calls

from liteattention.runtime import RunHandle, Threshold

SAMPLERS = ["euler", "heun", "dpmpp_2m", "res_multistep", "uni_pc"]
EVALUATIONS = {"heun": 2 * 6 - 1}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_threshold_minus_30_is_dense_within_rounding(kit, sampler):
    dense = kit.sample(kit.model, 6, sampler=sampler)
    lite = kit.sample(kit.lite(rule=Threshold(-30.0)), 6, sampler=sampler)
    assert (lite - dense).abs().max() < 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masks_age_per_evaluation_and_books_balance(kit, runs, monkeypatch, sampler):
    calls = count_backend_calls(monkeypatch)
    handle = RunHandle()
    out = kit.sample(kit.lite(handle=handle), 6, sampler=sampler)
    assert torch.isfinite(out).all()
    summary = handle.summary
    assert summary.sparse_calls + sum(dense_calls(summary).values()) == len(calls)
    assert summary.forward_passes == EVALUATIONS.get(sampler, 6) and summary.steps_done == 6
    assert dense_calls(summary) == {"cross-attention": len(calls) // 2}
    run, = runs
    assert len(run.passes) == 2 * LAYERS
    assert set(run.passes.values()) == {summary.forward_passes}, "one recording pass per evaluation, not per step"
    assert summary.skipped > 0 and summary.skipped_per_step[0] == 0


def test_steps_are_those_of_this_run(kit, runs):
    """KSamplerAdvanced from 4 to 8: a run of four steps, its first one dense."""
    from nodes import KSamplerAdvanced

    model = kit.lite(warmup_steps=2)
    latent = {"samples": kit.latent()}
    with torch.inference_mode():
        first, = KSamplerAdvanced().sample(model, "enable", 1, 8, 2.0, "euler", "simple", kit.positive, kit.negative,
                                           latent, 0, 4, "enable")
        KSamplerAdvanced().sample(model, "disable", 1, 8, 2.0, "euler", "simple", kit.positive, kit.negative, first,
                                  4, 8, "disable")
    assert [s.close().total_steps for s in runs] == [4, 4]
    assert [s.close().plan for s in runs] == ["step 1 of 4 dense"] * 2
    assert {p for s in runs for p in s.passes.values()} == {4}, "the second run starts afresh"


def ksampler(kit, model):
    from nodes import KSampler

    return KSampler().sample(model, 1, 4, 2.0, "euler", "simple", kit.positive, kit.negative,
                             {"samples": kit.latent()})[0]["samples"], None


def ksampler_advanced(kit, model):
    from nodes import KSamplerAdvanced

    return KSamplerAdvanced().sample(model, "enable", 1, 4, 2.0, "euler", "simple", kit.positive, kit.negative,
                                     {"samples": kit.latent()}, 0, 10000, "disable")[0]["samples"], None


def custom(kit, model):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicScheduler, SamplerCustom

    sigmas = BasicScheduler.execute(model, "simple", 4, 1.0).args[0]
    outputs = SamplerCustom.execute(model, True, 1, 2.0, kit.positive, kit.negative,
                                    comfy.samplers.sampler_object("euler"), sigmas, {"samples": kit.latent()}).args
    return tuple(output["samples"] for output in outputs)


def custom_advanced(kit, model):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider, RandomNoise, SamplerCustomAdvanced

    sigmas = BasicScheduler.execute(model, "simple", 4, 1.0).args[0]
    noise = RandomNoise.execute(1).args[0]
    guider = CFGGuider.execute(model, kit.positive, kit.negative, 2.0).args[0]
    outputs = SamplerCustomAdvanced.execute(noise, guider, comfy.samplers.sampler_object("euler"), sigmas,
                                            {"samples": kit.latent()}).args
    return tuple(output["samples"] for output in outputs)


@pytest.mark.parametrize("node", [ksampler, ksampler_advanced, custom, custom_advanced], ids=lambda f: f.__name__)
def test_sampler_nodes_give_the_same_run(kit, runs, monkeypatch, node):
    """Every node goes through the same wrapper: same latent, calls all accounted for, previews and x0 as ever."""
    calls = count_backend_calls(monkeypatch)
    with torch.inference_mode():
        lite, x0 = node(kit, kit.lite())
    run, = runs
    summary = run.close()
    assert summary.sparse_calls + sum(dense_calls(summary).values()) == len(calls) == 2 * summary.sparse_calls
    assert summary.steps_done == summary.total_steps == 4 and summary.sparse_calls == 4 * LAYERS and summary.skipped > 0
    assert torch.equal(lite, kit.sample(kit.lite()))
    with torch.inference_mode():
        dense, dense_x0 = node(kit, kit.model)
        untouched, untouched_x0 = node(kit, kit.lite(dense_blocks="0--1"))
    assert torch.equal(untouched, dense) and not torch.equal(lite, dense)
    if x0 is not None:
        # The last denoised latent, out of the callback, is where the run ends.
        assert torch.equal(untouched_x0, dense_x0) and (x0 - lite).abs().max() < 1e-4


def test_the_callback_sees_what_it_always_sees(kit):
    def record(log):
        def callback(*args):
            log.append((args[0], args[1].clone(), args[2].clone(), args[3]))
        return callback

    plain, ours = [], []
    kit.sample(kit.model, callback=record(plain))
    kit.sample(kit.lite(dense_blocks="0--1"), callback=record(ours))
    assert [(a[0], a[3]) for a in ours] == [(a[0], a[3]) for a in plain] == [(i, 4) for i in range(4)]
    for a, b in zip(plain, ours, strict=True):
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_an_error_in_the_counters_does_not_end_the_render(kit, monkeypatch, caplog):
    from liteattention.runtime import SamplingRun

    def broken(self, step):
        raise RuntimeError("counters")

    seen = []
    monkeypatch.setattr(SamplingRun, "end_step", broken)
    out = kit.sample(kit.lite(), callback=lambda *args: seen.append(args[0]))
    assert torch.isfinite(out).all() and seen == [0, 1, 2, 3]
    assert "the counters of some steps are not known. RuntimeError: counters" in caplog.text
