"""Lumina 2 and Z-Image: refiners of text and image first; Z-Image fills up text and image to groups of tokens."""

import pytest
from family_kit import NO_LAYER, TOO_SHORT, Case, check, names

TINY = {"patch_size": 2, "in_channels": 16, "dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1,
        "n_kv_heads": 1, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512], "cap_feat_dim": 64, "qk_norm": True,
        "multiple_of": 32, "ffn_dim_multiplier": 1.0, "rope_theta": 256.0}
Z_IMAGE = {**TINY, "dim": 256, "n_heads": 2, "n_kv_heads": 2,
           "z_image_modulation": True, "pad_tokens_multiple": 32, "time_scale": 1000.0}


def case(config, **changes):
    sizes = {key: value for key, value in config.items() if key not in ("n_layers", "cap_feat_dim")}
    return Case("Lumina 2, Z-Image", "comfy.ldm.lumina.model:NextDiT", config, (16, 48, 50), (60, 64), config["dim"],
                600, names("double", 2), {NO_LAYER: 1, TOO_SHORT: 1}, sizes=sizes, **changes)


CASES = [case(TINY, front=60, what="Lumina 2"),
         case(Z_IMAGE, behind=8, what="Z-Image, with filling behind the image")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lumina(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
