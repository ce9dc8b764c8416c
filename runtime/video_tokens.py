"""Where the video's tokens lie in the sequence of a self-attention."""

from __future__ import annotations

from typing import NamedTuple

from ..kernels import TILE, MustKeep
from .reasons import MOSTLY_EXTRA, NO_LAYOUT, NOT_VIDEO, Reason


class VideoTokens(NamedTuple):
    """What is known about the video's tokens in the self-attentions of a forward pass.

    Attributes:
        count: tokens of the video.
        front, behind: how many other tokens come before and after them. One of the two is enough, the rest of a
            sequence is at the other end; None for both means that it is not known.
        width: heads x head_dim of the attentions over the video, where attentions over other tokens have another one.
    """

    count: int
    front: int | None = None
    behind: int | None = None
    width: int | None = None

    @classmethod
    def of(cls, tokens: int | VideoTokens) -> VideoTokens:
        """`tokens`, or a bare count with nothing known beside it."""
        return tokens if isinstance(tokens, cls) else cls(tokens)

    def ends(self, seqlen: int) -> tuple[int, int]:
        """Tokens to keep at the start and at the end of a sequence: at least all that are not the video's."""
        extra = max(seqlen - self.count, 0)
        front = self.front if self.front is not None else extra - self.behind if self.behind is not None else -1
        return (front, extra - front) if 0 <= front <= extra else (extra, extra)


class VideoLayout(NamedTuple):
    """Where the frames of a video lie. tokens: of the video; frame_tokens: of one latent frame."""

    tokens: int | VideoTokens
    frame_tokens: int

    def frame_edges(self, seqlen: int) -> tuple[float, ...]:
        """Where latent frames start in a sequence, and where the last ends, in tiles; empty if that is not certain."""
        video = VideoTokens.of(self.tokens)
        front, behind = video.ends(seqlen)
        if self.frame_tokens < 1 or video.count % self.frame_tokens or front + video.count + behind != seqlen:
            return ()
        return tuple((front + at) / TILE for at in range(0, video.count + 1, self.frame_tokens))


def token_reason(seqlen: int, video_tokens: int | VideoTokens | None, width: int | None = None) -> Reason | None:
    """Why a self-attention over `seqlen` tokens, `width` = heads x head_dim, may not be one over the video's tokens, or
    None if it is."""
    if video_tokens is None:
        return NO_LAYOUT
    video = VideoTokens.of(video_tokens)
    if seqlen < video.count or (video.width is not None and width is not None and width != video.width):
        return NOT_VIDEO
    return MOSTLY_EXTRA if seqlen - video.count > video.count else None


def must_keep_tokens(seqlen: int, video_tokens: int | VideoTokens) -> MustKeep | None:
    """Ranges to protect when the sequence holds more than the video: text, references, registers.

    Models put them first (HunyuanVideo, Flux) or last (Mochi); where it is not known which, both ends stay.
    """
    front, behind = VideoTokens.of(video_tokens).ends(seqlen)
    ranges = tuple((start, stop) for start, stop in ((0, front), (seqlen - behind, seqlen)) if start < stop)
    return MustKeep(keys=ranges, queries=ranges) if ranges else None
