"""Qwen-Image: text in front of the image, images to edit behind it."""

import pytest
import torch
from family_kit import MASKED, Case, check, names

TINY = {"in_channels": 64, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
        "joint_attention_dim": 64}


def edited(generator):
    return {"reference_latents": [torch.randn(1, 16, 1, 16, 16, generator=generator)]}


def masked(generator):
    return {"attention_mask": torch.ones(1, 60, dtype=torch.long)}


LAYERS = names("double", 2)


def case(layers=LAYERS, **changes):
    return Case("Qwen-Image", "comfy.ldm.qwen_image.model:QwenImageTransformer2DModel", TINY, (16, 1, 48, 50), (60, 64),
                128, 600, layers, front=60, sizes={k: v for k, v in TINY.items() if k != "num_layers"},
                **changes)


CASES = [case(what="text"), case(conditions=edited, what="text and an image to edit"),
         case(conditions=masked, layers=set(), left={MASKED: 2}, what="text with an attention mask")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_qwen_image(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
