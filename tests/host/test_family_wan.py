"""Wan 2.1 and 2.2 and its relatives: the video is the sequence, references stand before or behind it."""

from types import SimpleNamespace

import pytest
import torch
from family_kit import CROSS, Case, check, names

TINY = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2, "in_dim": 16, "out_dim": 16}
WAN = "comfy.ldm.wan.model"


def latents(*channels_frames):
    def conditions(generator):
        return {name: torch.randn(1, channels, frames, 16, 16, generator=generator)
                for name, channels, frames in channels_frames}

    return conditions


def image_clip(generator):
    hidden = torch.randn(1, 257, 1280, generator=generator)
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=hidden)}


def vace(generator):
    return {"vace_frames": [torch.randn(1, 32, 5, 16, 16, generator=generator)] * 2,
            "vace_mask": [torch.ones(1, 64, 5, 16, 16)] * 2, "vace_strength": [1.0, 1.0]}


def speech(generator):
    return {"audio_embed": torch.randn(1, 25, 1024, 20, generator=generator),
            "reference_latents": [torch.randn(1, 16, 1, 16, 16, generator=generator)]}


def references(generator):
    return {"reference_latents": [torch.randn(1, 16, 1, 16, 16, generator=generator)]}


def in_context(generator):
    return {"context_latents": [torch.randn(1, 16, 1, 16, 16, generator=generator)]}


def case(family="Wan 2.1 / 2.2 T2V, I2V", network=f"{WAN}:WanModel", config=None, **changes):
    given = {"latent": (16, 5, 16, 16), "text": (4, 4096), "width": 128, "video": 320, "layers": names("double", 2),
             "left": {CROSS: 2}, **changes}
    return Case(family, network, {**TINY, **(config or {})}, **given)


CASES = [
    case(config={"model_type": "t2v"}, what="T2V"),
    case(config={"model_type": "i2v", "in_dim": 36}, conditions=image_clip, left={CROSS: 4}, what="I2V"),
    case(config={"model_type": "t2v", "in_dim_ref_conv": 16}, conditions=references, front=64,
         what="Fun: reference frame in front"),
    case(config={"model_type": "t2v"}, conditions=in_context, front=0, what="reference behind"),
    case("Wan VACE", f"{WAN}:VaceWanModel", {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
         conditions=vace, layers=names("double", 2) | {("double 0", 1), ("double 0", 2)}, left={CROSS: 4},
         what="control with two contexts"),
    case("Wan Camera", f"{WAN}:CameraWanModel", {"model_type": "camera_2.2", "in_dim": 36},
         conditions=latents(("camera_conditions", 24, 5)), what="camera embedding"),
    case("Wan S2V", f"{WAN}:WanModel_S2V", {"model_type": "s2v", "num_layers": 2}, conditions=speech, front=0,
         left={CROSS: 2}, what="speech, reference behind"),
    case("Wan Animate", "comfy.ldm.wan.model_animate:AnimateWanModel", {"model_type": "animate", "in_dim": 36,
                                                                          "num_layers": 5},
         conditions=latents(("pose_video_latent", 16, 4)), layers=names("double", 5), left={CROSS: 10},
         what="pose"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wan(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
