"""HunyuanVideo and 1.5: two stacks of blocks, and text, glyphs and an image in front of the video."""

from types import SimpleNamespace

import pytest
import torch
from family_kit import MASKED, NO_LAYER, Case, check, names

TINY = {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 64,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True,
        "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
        "meanflow_sum": False}
NEW = {**TINY, "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "guidance_embed": False, "byt5": True,
       "use_cond_type_embedding": True, "vision_in_dim": 1152, "patch_size": [1, 1, 1], "meanflow_sum": True}
LAYERS = names("double", 2) | names("single", 2)


def pooled(generator):
    return {"pooled_output": torch.randn(1, 768, generator=generator)}


def masked(generator):
    return {**pooled(generator), "attention_mask": torch.ones(1, 150, dtype=torch.long)}


def glyphs_and_image(generator):
    return {"pooled_output": None, "conditioning_byt5small": torch.randn(1, 20, 1472, generator=generator),
            "clip_vision_output": SimpleNamespace(last_hidden_state=torch.randn(1, 30, 1152, generator=generator))}


NETWORK = "comfy.ldm.hunyuan_video.model:HunyuanVideo"
FAMILY = "HunyuanVideo, HunyuanVideo 1.5"
CASES = [
    Case(FAMILY, NETWORK, TINY, (16, 5, 24, 20), (150, 64), 128, 600, LAYERS, {NO_LAYER: 2}, behind=0,
         conditions=pooled, what="HunyuanVideo"),
    Case(FAMILY, NETWORK, NEW, (32, 5, 12, 10), (140, 64), 128, 600, LAYERS, {NO_LAYER: 2}, behind=0,
         conditions=glyphs_and_image, what="1.5: text, glyphs and image"),
    Case(FAMILY, NETWORK, TINY, (16, 5, 24, 20), (150, 64), 128, 600, set(), {MASKED: 6}, behind=0, conditions=masked,
         cfg=1.0, what="text with an attention mask"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hunyuan_video(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
