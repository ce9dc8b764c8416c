"""With other nodes: guidance passes, caches, windows, compile, overrides before and after."""

import pytest
import torch
from host_kit import LAYERS, count_backend_calls, dense_calls

from liteattention.host import attach
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold


def test_skip_layer_guidance_passes_are_left_and_touch_no_mask(kit, runs):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    handle = RunHandle()
    slg = SkipLayerGuidanceDiT.execute(kit.model, 3.0, 0.0, 1.0, "1,2", "").args[0]
    kit.sample(kit.lite(slg, handle), steps=4)
    extra = dense_calls(handle.summary)["extra guidance pass"]
    assert extra == 4 * (LAYERS - 2), "its pass lacks two blocks"
    assert set(runs[0].passes.values()) == {4}, "the positive row is not aged twice"
    kit.sample(kit.lite())
    plain = {key.name: bits for (key, _), bits in runs[1].bits.items()}
    assert set(plain) == {key.name for key, _ in runs[0].bits}


@pytest.mark.parametrize("order", ["cache first", "cache last"])
@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
def test_step_caches_leave_gaps_without_aging_masks(kit, runs, monkeypatch, node, order):
    """One answers a step inside the model call, the other before it."""
    from comfy_extras import nodes_easycache

    def cached(model):
        return getattr(nodes_easycache, node).execute(model, 10.0, 0.0, 1.0, False).args[0]

    calls = count_backend_calls(monkeypatch)
    handle = RunHandle()
    model = kit.lite(cached(kit.model), handle) if order == "cache first" else cached(kit.lite(handle=handle))
    out = kit.sample(model, steps=8)
    summary = handle.summary
    assert torch.isfinite(out).all()
    assert summary.steps_done == 8 and None in summary.skipped_per_step, "a cached step has no share"
    assert summary.sparse_calls + sum(dense_calls(summary).values()) == len(calls)
    evaluations = len(calls) // (2 * LAYERS)
    assert 1 < evaluations < 8 and summary.forward_passes == evaluations
    assert set(runs[0].passes.values()) == {evaluations}


def window_node(model, schedule):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    options = {"context_length": 17, "context_overlap": 4, "context_schedule": schedule, "context_stride": 1,
               "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
    return WanContextWindowsManualNode.execute(model, **options).args[0]


@pytest.mark.parametrize("schedule", ["standard_static", "batched"])
def test_static_windows_have_masks_of_their_own(kit, runs, schedule):
    handle = RunHandle()
    model = kit.lite(window_node(kit.model, schedule), handle, rule=Threshold(-0.5))
    out = kit.sample(model, size=(9, 16, 16))
    assert torch.isfinite(out).all()
    windows = {key.window for key, _ in runs[0].passes}
    assert len(windows) >= 2 and None not in windows
    assert set(runs[0].passes.values()) == {4} and handle.summary.skipped > 0
    # From 0.33 on a window that does not begin the video gets a frame in front: another grid, a mask of its own.
    anchored = hasattr(model.model_options["context_handler"], "causal_window_fix")
    assert any(anchor is not None for _, anchor in windows) == anchored
    assert dense_calls(handle.summary) == {"cross-attention": handle.summary.sparse_calls}
    assert not handle.summary.notes, "no window starts another one's mask afresh"


def test_moving_windows_are_left(kit, runs):
    handle = RunHandle()
    model = kit.lite(window_node(kit.model, "standard_uniform"), handle)
    kit.sample(model, size=(9, 16, 16))
    assert handle.summary.sparse_calls == 0 and dense_calls(handle.summary)["context windows move between steps"] > 0


def test_compiled_models_keep_one_mask_per_layer(kit, runs):
    """ComfyUI's compile node drops the guards on transformer_options: traced, every layer would be block 0."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = kit.lite()
    plain = kit.sample(model)
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    try:
        out = kit.sample(compiled)
    finally:
        torch._dynamo.reset()
    assert (out - plain).abs().max() < 1e-3
    names = [key.name for key, _ in runs[-1].passes]
    assert sorted(set(names)) == [f"double {i}" for i in range(LAYERS)]
    assert set(runs[-1].passes.values()) == {4}


def test_an_earlier_override_serves_what_is_left(kit, monkeypatch):
    model, calls = kit.watched(kit.model)
    all_calls = count_backend_calls(monkeypatch)
    handle = RunHandle()
    kit.sample(kit.lite(model, handle))
    assert len(calls) == sum(dense_calls(handle.summary).values()) > 0
    assert len(calls) + handle.summary.sparse_calls == len(all_calls)


def test_a_second_application_replaces_the_first(kit, runs):
    model, calls = kit.watched(kit.model)
    for threshold in (-30.0, -9.0, -5.0, -2.0, -1.0):
        model = kit.lite(model, rule=Threshold(threshold))
    assert all(len(entries["lite_attention"]) == 1 for entries in model.wrappers.values())
    override = model.model_options["transformer_options"]["optimized_attention_override"]
    assert override.lite_attention_fallback.__name__ == "counting", "no chain of two"
    once = kit.lite(rule=Threshold(-1.0))
    for _ in range(3):
        assert torch.equal(kit.sample(model), kit.sample(once))
    assert [run.config.rule for run in runs] == [Threshold(-1.0)] * 6
    assert len(calls) == 3 * 4 * LAYERS, "cross-attention only: the chain did not grow"


def test_one_below_another_override_acts_once(kit, runs):
    """LiteAttention, then a node that chains, then LiteAttention again: the first one stays silent."""
    first = kit.lite(rule=Threshold(-1.0))
    below = first.model_options["transformer_options"]["optimized_attention_override"]
    between = first.clone()
    between.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, *args, **kwargs: below(func, *args, **kwargs))
    handle = RunHandle()
    kit.sample(kit.lite(between, handle, rule=Threshold(-2.0)))
    assert len(runs) == 1 and runs[0].config.rule == Threshold(-2.0)
    assert handle.summary.sparse_calls + sum(dense_calls(handle.summary).values()) == 4 * 2 * LAYERS


def test_an_override_after_the_node_is_explained(kit):
    handle = RunHandle()
    model = kit.lite(handle=handle)
    model.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, *args, **kwargs: func(*args, **kwargs))
    kit.sample(model)
    assert "put LiteAttention last" in handle.summary.text()


def test_the_input_model_is_left_as_it_was(kit):
    options = kit.model.model_options
    before = repr(sorted(options)), repr(options.get("transformer_options")), repr(kit.model.wrappers)
    dense = kit.sample(kit.model)
    kit.sample(kit.lite())
    assert before == (repr(sorted(options)), repr(options.get("transformer_options")), repr(kit.model.wrappers))
    assert torch.equal(kit.sample(kit.model), dense)


def test_everything_left_is_the_same_bytes_as_without_the_node(kit):
    assert torch.equal(kit.sample(kit.lite(dense_blocks="0--1")), kit.sample(kit.model))


def test_core_sparse_attention_is_refused(kit):
    def override(func, *args, **kwargs):
        return func(*args, **kwargs)

    override.__module__ = "comfy_extras.nodes_sparse_attention"
    model = kit.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    with pytest.raises(ValueError, match="already has Model Sparse Attention"):
        attach(model, LiteAttentionConfig())


def test_two_networks_in_one_run_have_masks_of_their_own(kit, runs):
    """DualModelGuider evaluates a second network with the first one's options."""
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(nodes, "DualModelGuider"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    import comfy.samplers
    from host_kit import Kit

    from liteattention.demo.pixels import PROMPTS

    other = Kit(PROMPTS.parent / "model").model
    model = kit.lite()
    guider = nodes.DualModelGuider.execute(model, kit.positive, 2.0, other, kit.negative).args[0]
    sigmas = nodes.BasicScheduler.execute(model, "simple", 4, 1.0).args[0]
    with torch.inference_mode():
        nodes.SamplerCustomAdvanced.execute(nodes.RandomNoise.execute(1).args[0], guider,
                                            comfy.samplers.sampler_object("euler"), sigmas,
                                            {"samples": kit.latent()})
    assert len({key.model for key, _ in runs[0].passes}) == 2
    assert set(runs[0].passes.values()) == {4}
