"""Runs that ask for nothing, or differently than expected: the summary names the cause, and only that."""

import inspect
import types
from dataclasses import replace

import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from family_cases import case
from family_kit import MIN_TOKENS, load, random_state, sample
from host_kit import LAYERS, dense_calls
from interop_kit import SMALL

from liteattention.host import attach
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold

OVERRIDE = "optimized_attention_override"


def plain_attention(q, k, v, heads):
    b, n, width = q.shape
    q, k, v = (x.view(b, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("by", ["object patch", "module"])
def test_modules_whose_forward_is_replaced_are_named_where_nothing_is_reached(by):
    """MiniMax H3 has no cross-attention: with a memory-efficient attention patch, not a single call comes."""
    tiny = case("MiniMax H3")
    model = load(tiny)
    blocks = [module for name, module in model.model.diffusion_model.named_modules() if name.endswith("attn")]
    names = [name for name, _ in model.model.diffusion_model.named_modules() if name.endswith("attn")]

    def forward(self, x, rope_freqs=None, transformer_options=None):
        q, k, v = self.qkv_proj(x)[None].chunk(3, dim=-1)
        return self.out_proj(plain_attention(q, k, v, self.heads)[0])

    for name, module in zip(names, blocks, strict=True):
        replaced = types.MethodType(forward, module)
        if by == "module":
            module.forward = replaced
        else:
            model.add_object_patch(f"diffusion_model.{name}.forward", replaced)
    handle = RunHandle()
    sample(tiny, attach(model, LiteAttentionConfig(min_tokens=MIN_TOKENS), handle=handle))
    headline = handle.summary.headline()
    assert f"a node has replaced diffusion_model.{names[0]}.forward and {len(names) - 1} more; remove it" in headline
    assert "last before the sampler" not in handle.summary.text()


def test_an_attention_on_top_is_named(kit):
    handle = RunHandle()
    model = kit.lite(handle=handle)
    model.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: func(*args, **kwargs)
    kit.sample(model, size=SMALL)
    assert "test_silence, set by a node after it, has the attention; put LiteAttention last before" in \
        handle.summary.headline()


def test_whole_blocks_that_a_node_computes_are_named(kit):
    for block in kit.model.get_model_object("diffusion_model").blocks:
        block.self_attn.forward = block.self_attn.forward  # as ComfyUI leaves it behind after an object patch
    model = kit.model.clone()
    for index in range(LAYERS):
        model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", index)
    handle = RunHandle()
    kit.sample(kit.lite(model, handle), size=SMALL)
    assert "a node computes whole blocks of the model" in handle.summary.headline()


def test_a_run_without_a_single_evaluation_blames_nobody(kit):
    handle = RunHandle()
    model = kit.lite(handle=handle)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "cache",
                               lambda executor, model, conds, x, *args: [torch.zeros_like(x) for _ in conds])
    kit.sample(model, size=SMALL)
    assert handle.summary.headline() == "off: no attention call reached LiteAttention"


UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4,
        "transformer_depth_middle": 1, "context_dim": 64, "num_heads": 1, "use_spatial_transformer": True}


def tiny_unet():
    config = comfy.supported_models.SD15(dict(comfy.supported_models.SD15.unet_config))
    config.unet_config = {**UNET, "dtype": torch.float32}
    model = config.get_model({}, device="cpu")
    assert type(model.diffusion_model) is UNetModel
    model.diffusion_model.load_state_dict(random_state(UNetModel, UNET))
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def test_a_unet_is_not_served_and_is_told_so_without_other_advice():
    tiny = replace(case("Wan T2V"), latent=(4, 48, 48), text=(4, 64))
    model, handle = tiny_unet(), RunHandle()
    plain = sample(tiny, model)
    assert sample(tiny, attach(model, LiteAttentionConfig(min_tokens=MIN_TOKENS), handle=handle)).equal(plain)
    line, = handle.summary.lines()
    assert line.startswith("off: this model is not served: a UNet") and "bypass the node" in line
    assert handle.summary.report().startswith(line) and not handle.summary.dense_calls


def with_patch(options):
    """transformer_options with a block patch more, which only passes on."""
    def passing(args, extra):
        return extra["original_block"](args)

    dit = options.get("patches_replace", {}).get("dit", {})
    return {**options, "patches_replace": {"dit": {("double_block", 0): passing, **dit}}}


def on_prepare_state(model):
    """A node that puts its block patches on a model as the model runs."""
    patched = model.clone()

    def install(patcher, timestep, options):
        options["transformer_options"] = with_patch(options["transformer_options"])

    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "patches", install)
    return patched


def outer_wrapper(model):
    patched = model.clone()

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        return executor(x, t, c_concat, c_crossattn, control, with_patch(transformer_options), **kwargs)

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "patches", wrapper)
    return patched


@pytest.mark.parametrize("install", [on_prepare_state, outer_wrapper])
def test_patches_that_come_while_the_model_runs_are_no_extra_pass(kit, runs, install):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    if install is on_prepare_state and "model_options" not in inspect.signature(ModelPatcher.prepare_state).parameters:
        pytest.skip("this ComfyUI hands no options to ON_PREPARE_STATE")
    handle = RunHandle()
    kit.sample(kit.lite(install(kit.model), handle), size=SMALL)
    assert handle.summary.sparse_calls == 4 * LAYERS and dense_calls(handle.summary) == {"cross-attention": 4 * LAYERS}
    slg = SkipLayerGuidanceDiT.execute(install(kit.model), 3.0, 0.0, 1.0, "1,2", "").args[0]
    kit.sample(kit.lite(slg, handle), size=SMALL)
    assert dense_calls(handle.summary)["extra guidance pass"] == 4 * (LAYERS - 2)
    assert handle.summary.sparse_calls == 4 * LAYERS and set(runs[-1].passes.values()) == {4}


def test_extra_passes_in_context_windows_are_told_apart_as_well(kit, runs):
    """Every window has a sigma tensor of its own, in the extra passes, too."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    slg = SkipLayerGuidanceDiT.execute(kit.model, 3.0, 0.0, 1.0, "1,2", "").args[0]
    windows = WanContextWindowsManualNode.execute(
        slg, context_length=17, context_overlap=4, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", freenoise=False).args[0]
    handle = RunHandle()
    kit.sample(kit.lite(windows, handle), size=(9, 16, 16))
    assert dense_calls(handle.summary)["extra guidance pass"] and set(runs[-1].passes.values()) == {4}


def test_a_sampler_that_reports_no_steps_skips_all_the_same(kit):
    def silent(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            denoised = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    sampler = comfy.samplers.KSAMPLER(silent)
    sigmas = comfy.samplers.calculate_sigmas(kit.model.get_model_object("model_sampling"), "simple", 8)
    handle = RunHandle()
    latent = kit.latent()
    with torch.inference_mode():
        comfy.sample.sample_custom(kit.lite(handle=handle, rule=Threshold(-1.0)), comfy.sample.prepare_noise(latent, 1),
                                   2.0, sampler, sigmas, kit.positive, kit.negative, latent, disable_pbar=True, seed=1)
    summary = handle.summary
    assert summary.skipped > 0 and summary.steps_done == 8 and handle.masks is not None
    assert "the sampler reports no steps; every evaluation of the model counts as one" in summary.notes
