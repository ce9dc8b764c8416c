"""CogVideoX: text in front of the video; 1.5 has patches of two frames."""

import pytest
from family_kit import Case, check, names

TINY = {"num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 64, "num_layers": 2, "in_channels": 16,
        "patch_size": 2, "text_embed_dim": 64, "use_rotary_positional_embeddings": True}


def case(config, **changes):
    return Case("CogVideoX", "comfy.ldm.cogvideo.model:CogVideoXTransformer3DModel", {**TINY, **config},
                (16, 6, 20, 20), (60, 64), 128, layers=names("double", 2), behind=0, **changes)


CASES = [case({}, video=600, what="1.0"), case({"patch_size_t": 2}, video=300, what="1.5")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cogvideo(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)
