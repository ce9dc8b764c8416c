"""Other nodes that add passes, skip steps or split the conditioning: guidance, caches, control, windows, regions."""

import types

import comfy.cldm.mmdit
import comfy.controlnet
import comfy.model_management
import comfy.ops
import pytest
import torch
from family_cases import case as case_of
from family_kit import close, load, random_state, sites
from family_kit import sample as sample_case
from host_kit import LAYERS, Kit, dense_calls
from interop_kit import ORDERS, SMALL, STEPS, check_dense_runs, in_order, node, plain, rows_of, sample_with

from liteattention.demo.pixels import prompt_tokens
from liteattention.host import attach
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold

MIDDLE = [[prompt_tokens(1, 1, 1), {}]]
OTHER = [[prompt_tokens(1, 3, 2), {}]]
EXTRA = "extra guidance pass"


def slg(model):
    return node("comfy_extras.nodes_slg", "SkipLayerGuidanceDiT").execute(model, 3.0, 0.0, 1.0, "1,2", "").args[0]


def slg_simple(model):
    return node("comfy_extras.nodes_slg", "SkipLayerGuidanceDiTSimple").execute(model, 0.0, 1.0, "1,2", "").args[0]


def pag(model):
    return node("comfy_extras.nodes_pag", "PerturbedAttentionGuidance").execute(model, 3.0).args[0]


def perp_neg(model):
    return node("comfy_extras.nodes_perpneg", "PerpNeg").execute(model, OTHER, 1.0).args[0]


def easy_cache(model):
    return node("comfy_extras.nodes_easycache", "EasyCacheNode").execute(model, 10.0, 0.0, 1.0, False).args[0]


def lazy_cache(model):
    return node("comfy_extras.nodes_easycache", "LazyCacheNode").execute(model, 10.0, 0.0, 1.0, False).args[0]


def windows(model):
    return node("comfy_extras.nodes_context_windows", "WanContextWindowsManualNode").execute(
        model, context_length=13, context_overlap=4, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", freenoise=False).args[0]


# other node: (sparse calls, dense calls by reason except cross-attention, recording passes of a mask)
PATCHES = {
    slg: (STEPS * LAYERS, {EXTRA: STEPS * (LAYERS - 2)}, {STEPS}),
    slg_simple: (STEPS * LAYERS, {EXTRA: STEPS * (LAYERS - 2)}, {STEPS}),
    pag: (STEPS * LAYERS, {EXTRA: STEPS * LAYERS}, {STEPS}),
    perp_neg: (2 * STEPS * LAYERS, {}, {STEPS}),
    easy_cache: (2 * LAYERS, {}, {2}),
    lazy_cache: (2 * LAYERS, {}, {2}),
    windows: (2 * STEPS * LAYERS, {}, {STEPS}),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("other", PATCHES, ids=lambda f: f.__name__)
def test_model_patches(kit, runs, other, order):
    """Every order, every pass: what is sparse, what is dense and why, and the node's effect is the same as alone."""
    sparse, dense, passes = PATCHES[other]
    alone = check_dense_runs(kit, order, other)
    # Core's PAG replaces attention in blocks that only UNets have: on a DiT its pass is an ordinary one.
    assert ((alone - plain(kit)).abs().max() < 1e-3) == (other is pag)
    handle = RunHandle()
    out = kit.sample(in_order(kit, order, other, handle, rule=Threshold(0.0)), STEPS, size=SMALL)
    summary = handle.summary
    assert torch.isfinite(out).all() and not summary.notes and summary.skipped > 0
    assert summary.sparse_calls == sparse and set(runs[-1].passes.values()) == passes
    assert {reason: count for reason, count in dense_calls(summary).items() if reason != "cross-attention"} == dense
    assert dense_calls(summary)["cross-attention"] == sparse + sum(dense.values())


@pytest.mark.parametrize("order", ORDERS)
def test_nag(runs, order):
    """It mixes rows of the attention's output, in place; here on Flux, because Wan has no place for such a patch."""
    nag = node("comfy_extras.nodes_nag", "NAGuidance")
    case = case_of("Flux")
    model = load(case)

    def guided(model):
        return nag.execute(model, 5.0, 0.5, 1.5).args[0]

    def run(handle=None, **settings):
        def lite(model):
            config = LiteAttentionConfig(min_tokens=128, warmup_steps=1, **settings)
            return attach(model, config, handle=handle or RunHandle())

        return sample_case(case, lite(guided(model)) if order == "other node first" else guided(lite(model)))

    alone = sample_case(case, guided(model))
    assert not torch.equal(alone, sample_case(case, model)), "it has an effect"
    assert torch.equal(run(dense_blocks="0--1"), alone)
    handle = RunHandle()
    dense = run(handle, rule=Threshold(-30.0))
    assert close(dense, alone)
    summary = handle.summary
    assert summary.sparse_calls == 3 * len(case.layers) and not summary.dense_calls and not summary.notes
    sparse = run(rule=Threshold(0.0))
    assert torch.isfinite(sparse).all() and runs[-1].close().skipped > 0
    assert sites(runs[-1]) == case.layers


def perp_neg_guider(kit, model):
    return node("comfy_extras.nodes_perpneg", "PerpNegGuider").execute(model, kit.positive, kit.negative, OTHER, 2.0,
                                                                       1.0).args[0]


def dual_cfg(kit, model):
    return node("comfy_extras.nodes_custom_sampler", "DualCFGGuider").execute(
        model, kit.positive, MIDDLE, kit.negative, 2.0, 1.5, "regular").args[0]


@pytest.mark.parametrize("guider", [perp_neg_guider, dual_cfg], ids=lambda f: f.__name__)
def test_guiders_of_three_conditionings(kit, runs, guider):
    """Each has rows of its own. The guider comes after the model: there is one order."""
    def run(**settings):
        return sample_with(kit, guider(kit, kit.lite(**settings) if settings else kit.model), SMALL)

    alone = run()
    assert torch.equal(run(dense_blocks="0--1"), alone)
    assert (run(rule=Threshold(-30.0)) - alone).abs().max() < 1e-3
    handle = RunHandle()
    run(handle=handle, rule=Threshold(-0.5))
    assert len({row.uuid for row in rows_of(runs[-1])}) == 3 == len(rows_of(runs[-1]))
    assert set(runs[-1].passes.values()) == {STEPS} and handle.summary.skipped > 0
    summary = handle.summary
    assert dense_calls(summary) == {"cross-attention": summary.sparse_calls} and not summary.notes


@pytest.fixture(scope="module")
def second(model_folder):
    """The same network loaded again."""
    return Kit(model_folder).model


@pytest.mark.parametrize("patched", ["first", "second", "both"])
def test_dual_model_guider(kit, second, runs, patched):
    """The positive conditioning on one network, the negative one on another; the first one's options hold for both."""
    dual = node("comfy_extras.nodes_custom_sampler", "DualModelGuider")

    def run(handle=None, **settings):
        first_handle, second_handle = (handle, None) if patched != "second" else (None, handle)
        first = kit.lite(handle=first_handle, **settings) if patched != "second" else kit.model
        other = kit.lite(second, second_handle, **settings) if patched != "first" else second
        guider = dual.execute(first, kit.positive, 2.0, other, kit.negative).args[0]
        return sample_with(kit, guider, SMALL)

    alone = sample_with(kit, dual.execute(kit.model, kit.positive, 2.0, second, kit.negative).args[0], SMALL)
    assert torch.equal(run(dense_blocks="0--1"), alone)
    assert (run(rule=Threshold(-30.0)) - alone).abs().max() < 1e-3
    runs.clear()
    handle = RunHandle()
    run(handle, rule=Threshold(-0.5))
    if patched == "second":
        assert not runs and handle.summary is None, "on the second network alone it does nothing"
        return
    assert len(runs) == 1 and len({key.model for key, _ in runs[0].passes}) == 2
    assert set(runs[0].passes.values()) == {STEPS} and handle.summary.skipped > 0
    assert handle.summary.sparse_calls == 2 * STEPS * LAYERS


def test_regions_by_node(kit, runs):
    """ConditioningSetAreaPercentageVideo, ConditioningSetMask and ConditioningCombine."""
    area = node("comfy_extras.nodes_video_model", "ConditioningSetAreaPercentageVideo")()
    from nodes import ConditioningCombine, ConditioningSetMask

    half, = area.append(MIDDLE, 1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 1.0)
    masked, = ConditioningSetMask().append(OTHER, torch.ones(1, *SMALL[1:]), "default", 1.0)
    positive, = ConditioningCombine().combine(kit.positive, half)
    positive, = ConditioningCombine().combine(positive, masked)

    def run(model):
        return kit.sample(model, STEPS, size=SMALL, positive=positive)

    alone = run(kit.model)
    assert not torch.equal(alone, plain(kit))
    assert torch.equal(run(kit.lite(dense_blocks="0--1")), alone)
    assert (run(kit.lite(rule=Threshold(-30.0))) - alone).abs().max() < 1e-3
    handle = RunHandle()
    run(kit.lite(handle=handle, rule=Threshold(-0.5)))
    assert len({row.uuid for row in rows_of(runs[-1])}) == 4, "one negative and three positive conditionings"
    assert set(runs[-1].passes.values()) == {STEPS} and not handle.summary.notes
    shapes = {row.uuid: {bits.shape for (_, other), bits in runs[-1].bits.items() if other.uuid == row.uuid}
              for row in rows_of(runs[-1])}
    assert len({shape for found in shapes.values() for shape in found}) == 2, "a region has a smaller grid"


def test_controlnet(runs):
    """ControlNetApplyAdvanced with a ControlNet of SD3: its own attentions are not the model's layers."""
    from nodes import ControlNetApplyAdvanced

    case = case_of("SD3.5 large")
    model = load(case)
    config = {name: value for name, value in case.config.items() if name != "num_blocks"}
    state = random_state(comfy.cldm.mmdit.ControlNet, {**config, "num_blocks": 1})
    net = comfy.cldm.mmdit.ControlNet(**config, num_blocks=1, dtype=torch.float32, device="cpu",
                                      operations=comfy.ops.disable_weight_init)
    net.load_state_dict(state)
    control = comfy.controlnet.ControlNet(net, compression_ratio=1, latent_format=comfy.latent_formats.SD3(),
                                          load_device=torch.device("cpu"))
    vae = types.SimpleNamespace(encode=lambda image: image.movedim(-1, 1)[:, :1].repeat(1, 16, 1, 1),
                                spacial_compression_encode=lambda: 1)
    image = torch.rand(1, *case.latent[1:], 3, generator=torch.Generator().manual_seed(0))

    def run(threshold=None, controlled=True, **settings):
        import comfy.sample
        from family_kit import conditioning

        positive, negative = conditioning(case, 2), conditioning(case, 3)
        if controlled:
            positive, negative = ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, image, 1.0,
                                                                            0.0, 1.0, vae)
        config = LiteAttentionConfig(rule=Threshold(threshold or 0.0), min_tokens=128, warmup_steps=1, **settings)
        used = model if threshold is None and not settings else attach(model, config, handle=handle)
        latent = torch.zeros(1, *case.latent)
        with torch.inference_mode():
            return comfy.sample.sample(used, comfy.sample.prepare_noise(latent, 1), 3, 2.0, "euler", "simple", positive,
                                       negative, latent, seed=1, disable_pbar=True)

    handle = RunHandle()
    alone = run()
    assert torch.isfinite(alone).all() and not torch.equal(alone, run(controlled=False)), "it has an effect"
    assert torch.equal(run(dense_blocks="0--1"), alone)
    assert close(run(-30.0), alone)
    run(threshold=0.0)
    assert sites(runs[-1]) == case.layers
    assert set(runs[-1].passes.values()) == {3} and handle.summary.skipped > 0
    assert handle.summary.sparse_calls == 3 * len(case.layers) and not handle.summary.notes


class Frames:
    """Stands for the video VAE: as many channels and frames as the latent has."""

    def temporal_compression_decode(self):
        return 1

    def spacial_compression_encode(self):
        return 1

    def encode(self, frames):
        return frames.movedim(-1, 0)[:1].repeat(16, 1, 1, 1)[None]


@pytest.mark.parametrize("order", ORDERS)
def test_uni3c_control_of_wan(kit, runs, order):
    """A ControlNet for Wan: its attentions run between the model's blocks, without the model's options."""
    apply = node("comfy_extras.nodes_model_patch", "WanUni3CControlnetApply")
    from comfy.ldm.wan.uni3c import WanUni3CControlnet
    from comfy.model_patcher import CoreModelPatcher

    width = kit.model.get_model_object("diffusion_model").dim
    config = {"in_channels": 36, "conv_out_dim": 64, "dim": 128, "ffn_dim": 128, "num_heads": 16, "num_layers": 2,
              "time_embed_dim": width, "out_proj_dim": width, "mid_channels": 16}
    net = WanUni3CControlnet(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast)
    net.load_state_dict(random_state(WanUni3CControlnet, config))
    cpu = torch.device("cpu")
    comfy.model_management.unload_all_models()
    control = CoreModelPatcher(net, load_device=cpu, offload_device=cpu)
    video = torch.rand(*SMALL, 3, generator=torch.Generator().manual_seed(0))

    def controlled(model):
        return apply().apply_patch(model, control, Frames(), video, 0.5, 0.0, 1.0)[0]

    alone = check_dense_runs(kit, order, controlled)
    assert not torch.equal(alone, plain(kit)), "it has an effect"
    handle = RunHandle()
    kit.sample(in_order(kit, order, controlled, handle, rule=Threshold(-0.5)), STEPS, size=SMALL)
    assert handle.summary.sparse_calls == STEPS * LAYERS == dense_calls(handle.summary)["cross-attention"]
    assert handle.summary.skipped > 0 and set(runs[-1].passes.values()) == {STEPS}
