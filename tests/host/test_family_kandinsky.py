"""Kandinsky 5: blocks of the text alone come first, without a number."""

import pytest
import torch
from family_kit import CROSS, NO_LAYER, Case, check, names

TINY = {"in_text_dim": 64, "in_text_dim2": 32, "time_dim": 64, "model_dim": 128, "ff_dim": 128, "visual_embed_dim": 132,
        "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (16, 24, 24)}


def pooled(generator):
    return {"pooled_output": torch.randn(1, 32, generator=generator)}


CASES = [Case("Kandinsky 5", "comfy.ldm.kandinsky5.model:Kandinsky5", TINY, (16, 5, 16, 16), (140, 64), 128, 320,
              names("double", 2), {NO_LAYER: 1, CROSS: 2}, conditions=pooled, sizes=TINY, what="video")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kandinsky(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
