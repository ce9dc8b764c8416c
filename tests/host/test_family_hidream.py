"""HiDream-I1: the image first; text behind it, more in blocks of two streams than in those of one."""

import pytest
import torch
from family_kit import Case, check, names

TINY = {"attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [32, 64],
        "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1, 2, 3], "num_attention_heads": 1,
        "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 2, "num_single_layers": 2,
        "out_channels": 16, "patch_size": 2, "text_emb_dim": 32}


def llama(generator):
    return {"pooled_output": torch.randn(1, 32, generator=generator),
            "conditioning_llama3": torch.randn(1, 4, 30, 64, generator=generator)}


CASES = [Case("HiDream-I1", "comfy.ldm.hidream.model:HiDreamImageTransformer2DModel", TINY, (16, 48, 50), (40, 32), 128,
              600, names("double", 2) | names("single", 2), front=0, conditions=llama, sizes=TINY,
              what="text of two lengths")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hidream(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
