"""MiniMax H3: one packed sequence with the video at its end; q, k, v in containers that an attention can empty."""

import weakref

import pytest
import torch
from family_kit import STEPS, Case, check, load, names, sample

from liteattention.host import attach
from liteattention.runtime import LiteAttentionConfig, RunHandle

TINY = {"hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 1,
        "attention_head_dim": 128, "ffn_hidden_size": 128, "latents_dim": 24, "audio_latents_dim": 32, "text_dim": 64,
        "timestep_input_dim": 32, "time_embed_hidden_size": 64, "time_embed_dim": 64, "rope_inv_freq_len": 16}


def keyframe(generator):
    latent = torch.randn(1, 24, 1, 20, 24, generator=generator)
    return {"minimax_keyframes": [{"latent": latent, "resolved_frame_index": 0}]}


def case(**changes):
    return Case("MiniMax H3", "comfy.ldm.minimax.model:MiniMaxH3Model", TINY, ((24, 5, 20, 24), (32, 2, 10)), (60, 64),
                128, 600, names("double", 2), behind=0, **changes)


CASES = [case(what="text, audio, video"), case(conditions=keyframe, what="text, keyframe, audio, video")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_minimax(case, sessions, monkeypatch):
    check(case, sessions, monkeypatch)


@pytest.mark.parametrize("entry", [True, False], ids=["takes containers", "takes tensors"])
def test_a_call_that_is_left_hands_over_its_containers(entry):
    """The attention before ours can free q before it allocates anything: nobody else holds it."""
    model = load(CASES[0])
    plain = sample(CASES[0], model)
    freed = []

    def previous(func, q, k, v, heads, **kwargs):
        return func(q, k, v, heads, **kwargs)

    def containers(q, k, v, heads, **kwargs):
        tensor = q.take()
        alive, copy = weakref.ref(tensor), tensor.clone()
        del tensor
        freed.append(alive() is None)
        import comfy.ldm.modules.attention as attention

        return attention.optimized_attention(copy, k.take(), v.take(), heads, **kwargs)

    if entry:
        previous.container_function = containers
    model.model_options["transformer_options"]["optimized_attention_override"] = previous
    handle = RunHandle()
    config = LiteAttentionConfig(threshold=-30.0, min_tokens=128, warmup_steps=1, dense_blocks="0")
    out = sample(CASES[0], attach(model, config, handle=handle))
    assert (out - plain).abs().max() < 1e-3
    receipt = handle.receipt
    assert receipt.left == {"dense_blocks": receipt.evaluations} and receipt.taken == receipt.evaluations >= STEPS
    assert freed == ([True] * receipt.evaluations if entry else [])
