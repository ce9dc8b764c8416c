"""Flux: text in front of the image, references of Kontext behind it."""

import pytest
import torch
from family_kit import Case, check, names

TINY = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": []}


def pooled(generator):
    return {"pooled_output": torch.randn(1, 32, generator=generator)}


def reference(generator):
    return {**pooled(generator), "reference_latents": [torch.randn(1, 16, 16, 16, generator=generator)]}


def case(**changes):
    return Case("Flux", "comfy.ldm.flux.model:Flux", TINY, (16, 48, 50), (60, 64), 128, 600,
                names("double", 2) | names("single", 2), front=60, **changes)


CASES = [case(conditions=pooled, what="text"), case(conditions=reference, what="text and a Kontext reference")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flux(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
