"""An attention that is called in parts: group by group of its heads, or piece by piece of its queries."""

import pytest
import torch
from run_kit import masks, passes, sampling_run

from liteattention.runtime import AttentionCall, LayerId, Threshold, VideoTokens
from liteattention.runtime.reasons import CROSS_ATTENTION, NOT_VIDEO, QUERY_PIECES

N, HEADS, D = 640, 5, 64
LAYERS = [LayerId("double", i, 2) for i in range(2)]
VIDEO = VideoTokens(N, heads=HEADS, width=HEADS * D)


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(2, HEADS, N, D, generator=generator) for _ in range(3))
    q[..., 0] += 8
    k[..., 0] += torch.tensor([8.0, 0.0, 5.0, 1.0, 6.0])[torch.arange(N) // 128].view(1, 1, N)
    return q, k, v


def dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def step(run, number, split, video=VIDEO, layers=LAYERS):
    """One step of one forward pass whose calls are those of `split(q, k, v)`; the outputs by layer."""
    forward_pass = run.forward_pass(model="m", rows=[("a", 0), ("b", 0)], video_tokens=video)
    q, k, v = tokens(number)
    out = [[forward_pass.attend(AttentionCall(*part, None, heads_out=True), layer, lambda p=part: dense(*p))
            for part in split(q, k, v)] for layer in layers]
    run.end_step(number)
    return out


def groups(*sizes):
    return lambda *qkv: list(zip(*(x.split(sizes, 1) for x in qkv), strict=True))


def pieces(*sizes, order=None):
    def split(q, k, v):
        parts = q.split(sizes, 2)
        return [(parts[i], k, v) for i in order or range(len(sizes))]
    return split


def whole(*qkv):
    return [qkv]


@pytest.mark.parametrize("changes", [
    [(2, 3)] * 5, [(1, 4)] * 5, [(1, 1, 1, 1, 1)] * 5, [(5,), (2, 3), (2, 3), (4, 1), (5,)],
    [(2, 3), (2, 3), (3, 2), (5,), (2, 3)]])
def test_groups_of_heads_give_what_the_whole_attention_gives(changes):
    plain, parted = sampling_run(5), sampling_run(5)
    for number, sizes in enumerate(changes):
        expected, out = step(plain, number, whole), step(parted, number, groups(*sizes))
        for (one,), several in zip(expected, out, strict=True):
            assert torch.allclose(torch.cat(several, 1), one, atol=1e-6)
    assert passes(parted) == passes(plain) == [5]
    bits = masks(plain)
    assert all(torch.equal(found, bits[place]) for place, found in masks(parted).items()) and len(bits) == 4
    one, several = plain.close(), parted.close()
    assert several.skipped > 0.1 and not several.notes
    for name in ("sparse_calls", "dense_calls", "layers", "skipped_per_step", "mask_bytes", "tiles_computed"):
        assert getattr(several, name) == getattr(one, name), name


def test_a_narrower_attention_after_the_whole_one_is_another():
    run = sampling_run(3)
    for number in range(3):
        step(run, number, lambda q, k, v: [(q, k, v), (q[:, :2], k[:, :2], v[:, :2])], layers=LAYERS[:1])
    summary = run.close()
    assert summary.sparse_calls == 3 and summary.dense_calls == {NOT_VIDEO: 3}


def test_groups_that_do_not_complete_an_attention_leave_the_next_one_alone():
    run = sampling_run(3)
    for number in range(3):
        step(run, number, lambda q, k, v: [(q[:, :2], k[:, :2], v[:, :2]), (q, k, v)], layers=LAYERS[:1])
    assert {key.ordinal for key, _ in masks(run)} == {0, 1} and run.close().sparse_calls == 6


@pytest.mark.parametrize("sizes", [(256, 384), (128,) * 5, (512, 128)])
def test_pieces_of_the_queries_are_sparse_once_they_have_added_up(sizes):
    run = sampling_run(5, rule=Threshold(-30.0))
    expected = [dense(*tokens(number)) for number in range(5)]
    for number in range(5):
        for several in step(run, number, pieces(*sizes)):
            assert torch.allclose(torch.cat(several, 2), expected[number], atol=1e-5)
    summary = run.close()
    assert summary.sparse_calls == 8 and summary.dense_calls == {QUERY_PIECES: 2}
    assert set(summary.layers) == {"double 0", "double 1"} and not summary.notes
    bolder = sampling_run(5)
    for number in range(5):
        step(bolder, number, pieces(*sizes))
    shares = bolder.close().skipped_per_step
    assert shares[:2] == [0, 0] and 0 < shares[2] <= shares[3] <= shares[4], "dense, recording, sparse"


@pytest.mark.parametrize("split", [
    pieces(200, 440), pieces(256, 256, 128, order=[0, 1]), pieces(256, 256, 128, order=[1, 0, 2]),
    pieces(128, 512, order=[0, 0])], ids=["no whole tiles", "not all", "out of order", "the same twice"])
def test_pieces_that_do_not_add_up_stay_dense_under_their_own_reason(split):
    run = sampling_run(4)
    for number in range(4):
        for several in step(run, number, split):
            assert all(torch.isfinite(out).all() for out in several)
    assert run.close().sparse_calls == 0 and set(run.counters.dense) == {QUERY_PIECES}


def test_must_keep_tokens_stay_where_a_piece_has_them():
    run, front = sampling_run(4, rule=Threshold(0.0)), 150
    video = VideoTokens(N - front, front=front, heads=HEADS)
    for number in range(4):
        step(run, number, pieces(256, 384), video)
    for (key, _), bits in masks(run).items():
        assert bits[..., :2].all() and bits.all() == (key.piece == 0), "the first piece has text in both of its tiles"
        assert bits.shape[-2:] == ((2, 5), (3, 5))[key.piece]


def test_a_masked_piece_and_cross_attention_have_their_own_reasons():
    run = sampling_run(2)
    forward_pass = run.forward_pass(model="m", rows=[("a", 0), ("b", 0)], video_tokens=VIDEO)
    q, k, v = tokens(0)
    masked, crossed = (q[:, :, :256], k, v), (q, k[:, :, :200], v[:, :, :200])
    for call in (AttentionCall(*masked, None, attn_mask=torch.zeros(1)), AttentionCall(*crossed, None)):
        forward_pass.attend(call, LAYERS[0], lambda: q)
    assert [reason.text for reason in run.counters.dense] == ["attention mask given", CROSS_ATTENTION.text]
