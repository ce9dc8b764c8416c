"""Which self-attentions are over the video, what is protected beside it, and where its frames lie."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from liteattention.kernels import TILE
from liteattention.runtime import VideoTokens
from liteattention.runtime.reasons import MOSTLY_EXTRA, NO_LAYOUT, NOT_VIDEO
from liteattention.runtime.video_tokens import Grid, must_keep_tokens, token_reason


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_tokens_beyond_the_latent_are_protected_wherever_they_stand(seqlen, latent):
    reason = token_reason(seqlen, latent)
    if seqlen < latent:
        assert reason == NOT_VIDEO
    elif seqlen > 2 * latent:
        assert reason == MOSTLY_EXTRA
    else:
        assert reason is None
        kept = must_keep_tokens(seqlen, latent)
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
    kept = must_keep_tokens(seqlen, VideoTokens(latent, *known))
    ranges = kept.keys if kept else ()
    assert ranges == tuple(r for r in ((0, front), (seqlen - behind, seqlen)) if r[0] < r[1])
    assert kept is None or kept.queries == ranges


@given(st.integers(1, 2000), st.integers(0, 2000), st.data())
def test_a_side_that_cannot_be_right_protects_both(latent, extra, data):
    wrong = extra + data.draw(st.integers(1, 2000))
    for sides in ((wrong, None), (None, wrong), (None, None)):
        assert must_keep_tokens(latent + extra, VideoTokens(latent, *sides)) == must_keep_tokens(latent + extra, latent)


def test_more_extra_tokens_than_the_video_has_are_served_where_all_of_them_are_accounted_for():
    assert token_reason(900, VideoTokens(300, 100, 500)) is None
    for seqlen, sides in ((901, (100, 500)), (900, (100, None)), (900, (None, 500))):
        assert token_reason(seqlen, VideoTokens(300, *sides)) == MOSTLY_EXTRA


def test_attentions_of_another_width_are_not_over_the_video():
    video = VideoTokens(500, width=256)
    assert token_reason(500, video, 256) is None
    assert token_reason(500, video, 128) == NOT_VIDEO


def test_an_unknown_layout_stays_dense():
    assert token_reason(500, None) == NO_LAYOUT


FRAMES = (3, 16, 16)


@pytest.mark.parametrize("video, seqlen, offset, edges", [
    (VideoTokens(768, grid=FRAMES), 768, 0, (0, 2, 4, 6)),
    (VideoTokens(768, front=64, grid=FRAMES), 832, 64, (0.5, 2.5, 4.5, 6.5)),
    (VideoTokens(768, behind=64, grid=FRAMES), 832, 0, (0, 2, 4, 6)),
    (VideoTokens(1024, behind=64, grid=FRAMES), 1088, 0, (0, 2, 4, 6)),  # 256 tokens of guides
    (VideoTokens(768, grid=FRAMES), 832, None, ()),
    (VideoTokens(700, grid=FRAMES), 700, None, ()),
    (VideoTokens(768), 768, None, ()),
    (VideoTokens(768, grid=(1, 24, 32)), 768, 0, ()),
])
def test_frames_lie_where_the_video_does_or_nowhere_if_that_is_not_certain(video, seqlen, offset, edges):
    assert video.grid_in(seqlen) == (None if offset is None else Grid(offset, *video.grid))
    assert video.frame_edges(seqlen) == edges
