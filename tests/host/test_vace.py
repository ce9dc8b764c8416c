"""Wan VACE: control blocks run inside the main blocks, several self-attentions under one block number."""

import comfy.sd
import pytest
import torch
from host_kit import LAYERS
from safetensors.torch import load_file, save_file

from liteattention.runtime import RunHandle, Threshold

VACE_BLOCKS = 1


@pytest.fixture(scope="module")
def vace(model_folder, tmp_path_factory):
    """The tiny model with a control tower of its own first block; ComfyUI's detection takes it for Wan VACE."""
    state = load_file(model_folder / "tiny_wan_t2v.safetensors")
    dim = state["patch_embedding.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    for name, value in list(state.items()):
        if name.startswith("blocks.0."):
            state[name.replace("blocks.0.", "vace_blocks.0.")] = value.clone()
    for name in ("before_proj", "after_proj"):
        state[f"vace_blocks.0.{name}.weight"] = (torch.randn(dim, dim, generator=generator) / dim).half()
        state[f"vace_blocks.0.{name}.bias"] = torch.zeros(dim).half()
    state["vace_patch_embedding.weight"] = (torch.randn(dim, 96, 1, 2, 2, generator=generator) / 400).half()
    state["vace_patch_embedding.bias"] = torch.zeros(dim).half()
    path = tmp_path_factory.mktemp("vace") / "tiny_vace.safetensors"
    save_file(state, path)
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    assert type(model.model).__name__ == "WAN21_Vace"
    return model


def with_control(conditioning, contexts=1):
    generator = torch.Generator().manual_seed(1)
    frames = [torch.randn(1, 32, 5, 16, 16, generator=generator) for _ in range(contexts)]
    masks = [torch.ones(1, 64, 5, 16, 16)] * contexts
    return [[tokens, {**options, "vace_frames": frames, "vace_mask": masks, "vace_strength": [1.0] * contexts}]
            for tokens, options in conditioning]


@pytest.mark.parametrize("contexts", [1, 2])
def test_every_self_attention_of_a_block_has_a_mask_of_its_own(kit, vace, runs, contexts):
    handle = RunHandle()
    positive, negative = (with_control(c, contexts) for c in (kit.positive, kit.negative))
    model = kit.lite(vace, handle, rule=Threshold(-0.5))
    out = kit.sample(model, positive=positive, negative=negative, size=(5, 16, 16))
    assert torch.isfinite(out).all()
    sites = {(key.block, key.ordinal) for key, _ in runs[0].passes}
    control = {("double 0", ordinal) for ordinal in range(1, VACE_BLOCKS * contexts + 1)}
    assert sites == {(f"double {i}", 0) for i in range(LAYERS)} | control
    assert set(runs[0].passes.values()) == {4}, "no mask is shared by two attentions of one evaluation"
    assert handle.summary.sparse_calls == 4 * len(sites) and handle.summary.skipped > 0
    dense = kit.sample(kit.lite(vace, rule=Threshold(-30.0)), positive=positive, negative=negative, size=(5, 16, 16))
    plain = kit.sample(vace, positive=positive, negative=negative, size=(5, 16, 16))
    assert (dense - plain).abs().max() < 1e-3
