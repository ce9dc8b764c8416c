"""Other transformers than plain Wan: tokens beside the video's, two stacks of blocks, no block numbers."""

import sys

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import pytest
import torch
from host_kit import LAYERS
from safetensors.torch import load_file, save_file

from liteattention.runtime import RunHandle

SIZE = (5, 16, 16)
VIDEO, TEXT = 320, 200
"""Tokens."""


def random_model(family, **unet_config):
    """A small random transformer of a family that ComfyUI supports, on the CPU in float32."""
    config = family({**unet_config, "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else None
            scale = 0.02 if fan_in is None else fan_in ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def hunyuan():
    return random_model(
        comfy.supported_models.HunyuanVideo, image_model="hunyuan_video", in_channels=16, out_channels=16,
        vec_in_dim=32, context_in_dim=64, hidden_size=128, mlp_ratio=2.0, num_heads=2, depth=2,
        depth_single_blocks=3, axes_dim=[16, 24, 24], theta=256, patch_size=[1, 2, 2], qkv_bias=True,
        guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None,
        meanflow_sum=False)


@pytest.fixture(scope="module")
def ltxv():
    return random_model(
        comfy.supported_models.LTXV, image_model="ltxv", in_channels=16, out_channels=16, cross_attention_dim=128,
        attention_head_dim=64, num_attention_heads=2, caption_channels=64, num_layers=2)


def words(tokens, width=64, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, width, generator=generator), options]]


def test_two_stacks_of_blocks_and_text_in_one_sequence(kit, hunyuan, sessions):
    """Both stacks of HunyuanVideo count from 0; its text refiner attends before any block, without a number."""
    handle = RunHandle()
    texts = [words(TEXT, seed=i, pooled_output=torch.randn(1, 32)) for i in range(2)]
    given = {"positive": texts[0], "negative": texts[1], "size": SIZE}
    out = kit.sample(kit.lite(hunyuan, handle, threshold=-30.0), **given)
    assert torch.isfinite(out).all()
    assert (out - kit.sample(hunyuan, **given)).abs().max() < 1e-3
    names = {key.name for key, _ in sessions[0].passes}
    assert names == {f"double {i}" for i in range(2)} | {f"single {i}" for i in range(3)}
    assert {key.ordinal for key, _ in sessions[0].passes} == {0}
    assert set(sessions[0].passes.values()) == {4}
    receipt = handle.receipt
    assert receipt.tokens == VIDEO + TEXT and receipt.taken == 4 * 5
    assert receipt.left == {"the model does not say which layer calls": 4 * 2}, "the refiner's two calls"


def test_a_model_of_no_family_that_does_not_number_its_blocks_is_left(kit, ltxv, monkeypatch):
    handle = RunHandle()
    monkeypatch.setattr(sys.modules["liteattention.host.families"], "_by_class", dict)
    mask = torch.ones(1, 6, dtype=torch.long)
    given = {"positive": words(6, attention_mask=mask), "negative": words(6, seed=1, attention_mask=mask),
             "size": SIZE}
    out = kit.sample(kit.lite(ltxv, handle), **given)
    assert torch.equal(out, kit.sample(ltxv, **given))
    assert handle.receipt.taken == 0
    assert handle.receipt.left["the model does not say which layer calls"] == 4 * 2


def test_a_model_of_no_family_keeps_both_ends_of_a_longer_sequence(kit, hunyuan, sessions, monkeypatch):
    monkeypatch.setattr(sys.modules["liteattention.host.families"], "_by_class", dict)
    texts = [words(TEXT, seed=i, pooled_output=torch.randn(1, 32)) for i in range(2)]
    handle = RunHandle()
    out = kit.sample(kit.lite(hunyuan, handle, threshold=0.0), positive=texts[0], negative=texts[1], size=SIZE)
    assert torch.isfinite(out).all() and handle.receipt.taken == 4 * 5
    for bits in sessions[0].bits.values():
        assert bits[..., :2].all() and bits[..., -2:].all(), "200 tokens at either end"


def test_a_reference_frame_in_front_of_the_video(kit, model_folder, sessions, tmp_path):
    """Wan Fun: N is one frame longer than the latent; the reference stays, the rest skips."""
    state = load_file(model_folder / "tiny_wan_t2v.safetensors")
    dim = state["patch_embedding.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    state["ref_conv.weight"] = (torch.randn(dim, 16, 2, 2, generator=generator) / 64).half()
    state["ref_conv.bias"] = torch.zeros(dim).half()
    save_file(state, tmp_path / "tiny_fun.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "tiny_fun.safetensors"),
                                          model_options={"dtype": torch.float32})
    reference = {"reference_latents": [torch.randn(1, 16, 1, 20, 20, generator=generator)]}
    positive, negative = ([[tokens, reference]] for (tokens, _), in (kit.positive, kit.negative))
    handle = RunHandle()
    out = kit.sample(kit.lite(model, handle, threshold=-0.5), positive=positive, negative=negative)
    assert torch.isfinite(out).all()
    receipt = handle.receipt
    assert receipt.tokens == 700 + 100 and receipt.taken == 4 * LAYERS and receipt.skipped > 0
    for bits in sessions[0].bits.values():
        assert bits[..., 0].all() and bits[..., 0, :].all()
