"""Nodes that save memory and call a self-attention in parts, on the tiny Wan model."""

import types

import pytest
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from host_kit import LAYERS, dense_calls

from liteattention.runtime import RunHandle, Threshold


def parted(kit, heads=None, queries=None):
    """The kit's model with patches of its self-attentions that call by groups of heads, or by pieces of the queries."""
    def forward(self, x, freqs, transformer_options=None, **kwargs):
        b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
        q = apply_rope1(self.norm_q(self.q(x)).view(b, s, n, d), freqs)
        k = apply_rope1(self.norm_k(self.k(x)).view(b, s, n, d), freqs)
        v = self.v(x).view(b, s, n, d)
        groups = [qkv for qkv in zip(*(t.split(heads or n, 2) for t in (q, k, v)), strict=True)]
        out = [torch.cat([optimized_attention(piece.flatten(2), k.flatten(2), v.flatten(2), heads=piece.shape[2],
                                              transformer_options=transformer_options)
                          for piece in q.split(queries or s, 1)], 1) for q, k, v in groups]
        return self.o(torch.cat(out, 2))

    model = kit.model.clone()
    for index in range(LAYERS):
        name = f"diffusion_model.blocks.{index}.self_attn"
        model.add_object_patch(f"{name}.forward", types.MethodType(forward, model.get_model_object(name)))
    return model


def test_groups_of_heads_give_the_same_run_as_the_whole_attention(kit):
    whole, groups = RunHandle(), RunHandle()
    expected = kit.sample(kit.lite(handle=whole))
    out = kit.sample(kit.lite(parted(kit, heads=1), handle=groups))
    assert torch.allclose(out, expected, atol=1e-4)
    one, several = whole.summary, groups.summary
    assert several.sparse_calls == one.sparse_calls and several.dense_calls == one.dense_calls
    assert several.skipped == pytest.approx(one.skipped, abs=0.01) and several.layers.keys() == one.layers.keys()


def test_pieces_of_the_queries_are_sparse_from_the_second_step(kit):
    handle = RunHandle()
    exact = kit.sample(kit.lite(parted(kit, queries=256), rule=Threshold(-30.0)))
    assert torch.allclose(exact, kit.sample(kit.model), atol=1e-3)
    kit.sample(kit.lite(parted(kit, queries=256), handle=handle))
    summary = handle.summary
    assert dense_calls(summary)["queries in pieces"] == LAYERS and summary.sparse_calls == 3 * LAYERS
    assert summary.skipped_per_step[-1] > 0 and summary.layers.keys() == {f"double {i}" for i in range(LAYERS)}
