"""LTXV and LTX-2: no block numbers of their own, guide frames, and an audio stream beside the video's."""

import json

import pytest
import torch
from comfy.ldm.lightricks import model as lightricks
from family_kit import CROSS, MASKED, NOT_VIDEO, TOO_SHORT, Case, check, names

TINY = {"in_channels": 128, "cross_attention_dim": 128, "attention_head_dim": 64, "num_attention_heads": 2,
        "caption_channels": 64, "num_layers": 2}
AUDIO = {**TINY, "audio_attention_head_dim": 64, "audio_num_attention_heads": 1, "audio_cross_attention_dim": 64,
         "connector_num_attention_heads": 1, "connector_attention_head_dim": 64, "connector_num_layers": 1,
         "audio_connector_num_attention_heads": 1}
FRAME = 80
"""Tokens."""
MASKED_GUIDES = {CROSS: 2 + 4} if hasattr(lightricks, "GuideAttentionMask") else {CROSS: 2, MASKED: 2}
"""Newer versions split the call instead of masking it."""


def prompt(generator):
    return {"attention_mask": torch.ones(1, 6, dtype=torch.long)}


def guide(strength=1.0, hidden=0):
    """A guide frame at the end of the latent, of which the mask hides some tokens."""

    def conditions(generator):
        mask = torch.ones(1, 1, 5, 8, 10)
        mask[:, :, -1].view(-1)[:hidden] = -1.0
        entry = {"pre_filter_count": FRAME, "strength": strength, "pixel_mask": None, "latent_shape": (1, 8, 10)}
        return {**prompt(generator), "keyframe_idxs": torch.zeros(1, 3, FRAME, 2), "concat_mask": mask,
                "guide_attention_entries": [entry]}

    return conditions


def case(family, network, config, **changes):
    sizes = {key: value for key, value in config.items() if key not in ("num_layers", "cross_attention_dim")}
    given = {"latent": (128, 5, 8, 10), "text": (6, 64), "width": 128, "video": 400, "layers": names("double", 2),
             "left": {CROSS: 2}, "conditions": prompt, "metadata": {"config": json.dumps({"transformer": sizes})},
             **changes}
    return Case(family, network, config, **given)


def ltxv(**changes):
    return case("LTXV", "comfy.ldm.lightricks.model:LTXVModel", TINY, **changes)


def ltx2(**changes):
    return case("LTX-2", "comfy.ldm.lightricks.av_model:LTXAVModel", AUDIO, text=(6, 128), **changes)


CASES = [
    ltxv(what="video"),
    ltxv(conditions=guide(), what="guide frame"),
    ltxv(conditions=guide(hidden=30), video=400 - 30, what="guide frame with masked tokens"),
    ltxv(conditions=guide(strength=0.5), layers=set(), left=MASKED_GUIDES, what="guide frame with a strength"),
    # Audio as long as the video, so that only the width of its attention tells it apart.
    ltx2(latent=((128, 5, 8, 10), (8, 400, 16)), left={CROSS: 4, NOT_VIDEO: 2 + 4}, what="video and audio"),
    ltx2(latent=((128, 5, 8, 10), (8, 40, 16)), left={CROSS: 4 + 4, TOO_SHORT: 2}, what="short audio"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ltx(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
