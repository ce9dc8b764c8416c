"""Mochi: text behind the video."""

import pytest
import torch
from family_kit import Case, check, names

TINY = {"depth": 2, "patch_size": 2, "num_heads": 1, "hidden_size_x": 128, "hidden_size_y": 64, "mlp_ratio_x": 96.0,
        "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
        "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
        "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True,
        "t5_feat_dim": 64, "t5_token_length": 256, "rope_theta": 10000.0}


def words(generator):
    mask = torch.zeros(1, 256, dtype=torch.long)
    mask[:, :60] = 1
    return {"attention_mask": mask}


CASES = [Case("Mochi", "comfy.ldm.genmo.joint_model.asymm_models_joint:AsymmDiTJoint", TINY, (12, 3, 20, 20), (256, 64),
              128, 300, names("double", 2), front=0, conditions=words, sizes=TINY, what="cropped text")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mochi(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
