"""SD3 and 3.5: text in front of the image; in 3.5 medium a second attention over the image alone."""

import pytest
import torch
from family_kit import Case, check, names

TINY = {"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 32, "num_blocks": 2,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, "qk_norm": "rms"}


def pooled(generator):
    return {"pooled_output": torch.randn(1, 32, generator=generator)}


def case(config=None, **changes):
    return Case("SD3, SD3.5", "comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
                {**TINY, **(config or {})}, (16, 48, 50), (60, 64), 128, 600, behind=0, conditions=pooled, **changes)


CASES = [
    case(layers=names("joint", 2), what="3.5 large"),
    case({"x_block_self_attn_layers": [0]}, layers=names("joint", 2) | {("joint 0", 1)}, what="3.5 medium"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sd3(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
