"""Cosmos Predict2: numbered blocks also where the model does not number them."""

import pytest
from family_kit import CROSS, Case, check, names

TINY = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_blocks": 2, "num_heads": 1,
        "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
        "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False}

CASES = [Case("Cosmos Predict2", "comfy.ldm.cosmos.predict2:MiniTrainDIT", TINY, (16, 5, 16, 16), (6, 64), 128, 320,
              names("block", 2), {CROSS: 2}, sizes=TINY, what="video")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cosmos(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
