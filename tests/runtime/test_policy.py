"""Which calls are taken, from shapes alone; the layout of a call and back."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from liteattention.kernels import TILE
from liteattention.runtime import AttentionCall, policy


def call(n=256, m=None, heads=2, head_dim=64, dtype=torch.float32, **kwargs):
    q = torch.empty(1, n, heads * head_dim, dtype=dtype)
    k = torch.empty(1, m or n, heads * head_dim, dtype=dtype)
    return AttentionCall.from_hook(q, k, k, heads, **kwargs)


def test_a_plain_self_attention_is_taken():
    assert policy.call_reason(call(), 128) is None


@pytest.mark.parametrize("made, reason", [
    (call(m=77), policy.CROSS_ATTENTION),
    (call(mask=torch.zeros(256, 256)), "attention mask given"),
    (call(head_dim=80), "head_dim 80 not supported"),
    (call(dtype=torch.float64), "dtype torch.float64 not supported"),
    (call(n=100), "fewer than 128 tokens"),
])
def test_reasons(made, reason):
    assert policy.call_reason(made, 128) == reason


def test_automatic_minimum_depends_on_the_device():
    assert policy.call_reason(call(n=1023), 0) == "fewer than 1024 tokens"
    assert policy.call_reason(call(n=1024), 0) is None


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_tokens_beyond_the_latent_are_protected_wherever_they_stand(seqlen, latent):
    reason = policy.token_reason(seqlen, latent)
    if seqlen < latent:
        assert reason == policy.NOT_VIDEO
    elif seqlen > 2 * latent:
        assert reason == policy.MOSTLY_EXTRA
    else:
        assert reason is None
        kept = policy.must_keep_tokens(seqlen, latent)
        extra = seqlen - latent
        if not extra:
            assert kept is None
        else:
            mask = kept.tile_mask(seqlen, seqlen)
            for token in (0, extra - 1, seqlen - extra, seqlen - 1):
                assert mask[token // TILE].all() and mask[:, token // TILE].all()


@given(st.integers(1, 2000), st.data())
def test_tokens_on_a_known_side_are_protected_there_and_nowhere_else(latent, data):
    front, behind = data.draw(st.integers(0, latent)), data.draw(st.integers(0, latent))
    assume(front + behind <= latent)
    seqlen = front + latent + behind
    known = data.draw(st.sampled_from([(front, behind), (front, None), (None, behind)]))
    kept = policy.must_keep_tokens(seqlen, policy.VideoTokens(latent, *known))
    ranges = kept.keys if kept else ()
    assert ranges == tuple(r for r in ((0, front), (seqlen - behind, seqlen)) if r[0] < r[1])
    assert kept is None or kept.queries == ranges


@given(st.integers(1, 2000), st.integers(0, 2000), st.data())
def test_a_side_that_cannot_be_right_protects_both(latent, extra, data):
    wrong = extra + data.draw(st.integers(1, 2000))
    for sides in ((wrong, None), (None, wrong), (None, None)):
        assert policy.must_keep_tokens(latent + extra, policy.VideoTokens(latent, *sides)) == \
            policy.must_keep_tokens(latent + extra, latent)


def test_attentions_of_another_width_are_not_over_the_video():
    video = policy.VideoTokens(500, width=256)
    assert policy.token_reason(500, video, 256) is None
    assert policy.token_reason(500, video, 128) == policy.NOT_VIDEO


def test_an_unknown_layout_is_left():
    assert policy.token_reason(500, None) == policy.NO_LAYOUT


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("heads_out", [True, False])
def test_results_return_as_views_in_the_layout_asked_for(packed, heads_out):
    n, heads, d = 130, 3, 64
    x = torch.randn(2, n, heads * d)
    split = x.unflatten(-1, (heads, d)).transpose(1, 2)
    q = x if packed else split
    made = AttentionCall.from_hook(q, q, q, heads, skip_reshape=not packed, skip_output_reshape=heads_out)
    assert (made.batch, made.heads, made.head_dim, made.seqlen_q, made.seqlen_k) == (2, heads, d, n, n)
    back = made.restore(q)
    assert torch.equal(back, split if heads_out else x)
    assert back.data_ptr() == x.data_ptr(), "no copy"
