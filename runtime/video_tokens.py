"""Where the video's tokens lie in the sequence of a self-attention."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..kernels import TILE, MustKeep
from .reasons import MOSTLY_EXTRA, NO_LAYOUT, NOT_VIDEO, Reason


class Grid(NamedTuple):
    """`frames` x `rows` x `columns` tokens in raster order, after `offset` others."""

    offset: int
    frames: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.offset + math.prod(self[1:])


class VideoTokens(NamedTuple):
    """What is known about the video's tokens in the self-attentions of a forward pass.

    Attributes:
        count: tokens of the video.
        front, behind: how many other tokens come before and after them. One of the two is enough, the rest of a
            sequence is at the other end; None for both means that it is not known. More of them than of the video are
            served where both are known.
        width: heads x head_dim of the attentions over the video, where attentions over other tokens have another one.
        heads: of an attention over the video, or None if unknown.
        grid: (frames, rows, columns) of the first of these tokens, or None if they are in no raster order; the rest of
            `count` are guides.
    """

    count: int
    front: int | None = None
    behind: int | None = None
    width: int | None = None
    heads: int | None = None
    grid: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, tokens: int | VideoTokens) -> VideoTokens:
        """`tokens`, or a bare count with nothing known beside it."""
        return tokens if isinstance(tokens, cls) else cls(tokens)

    def ends(self, seqlen: int) -> tuple[int, int]:
        """Tokens to keep at the start and at the end of a sequence: at least all that are not the video's."""
        extra = max(seqlen - self.count, 0)
        front = self.front if self.front is not None else extra - self.behind if self.behind is not None else -1
        return (front, extra - front) if 0 <= front <= extra else (extra, extra)

    def grid_in(self, seqlen: int) -> Grid | None:
        """Where the grid lies in a sequence, or None if that is not certain."""
        front, behind = self.ends(seqlen)
        if self.grid is None or math.prod(self.grid) > self.count or front + self.count + behind != seqlen:
            return None
        return Grid(front, *self.grid)

    def frame_edges(self, seqlen: int) -> tuple[float, ...]:
        """Where latent frames start in a sequence, and where the last ends, in tiles; empty if that is not certain, and
        for a single image."""
        grid = self.grid_in(seqlen)
        if grid is None or grid.frames < 2:
            return ()
        return tuple((grid.offset + i * grid.rows * grid.columns) / TILE for i in range(grid.frames + 1))


def token_reason(seqlen: int, video_tokens: int | VideoTokens | None, width: int | None = None) -> Reason | None:
    """Why a self-attention over `seqlen` tokens, `width` = heads x head_dim, may not be one over the video's tokens, or
    None if it is."""
    if video_tokens is None:
        return NO_LAYOUT
    video = VideoTokens.of(video_tokens)
    if seqlen < video.count or (video.width is not None and width is not None and width != video.width):
        return NOT_VIDEO
    extra = seqlen - video.count
    known = None not in (video.front, video.behind) and video.front + video.behind == extra
    return MOSTLY_EXTRA if extra > video.count and not known else None


def must_keep_tokens(seqlen: int, video_tokens: int | VideoTokens, queries: range | None = None) -> MustKeep | None:
    """Ranges to protect when the sequence holds more than the video: text, references, registers.

    Models put them first (HunyuanVideo, Flux) or last (Mochi); where it is not known which, both ends stay.

    Args:
        queries: tokens that ask; None: all.
    """
    front, behind = VideoTokens.of(video_tokens).ends(seqlen)
    asking = range(seqlen) if queries is None else queries
    keys = tuple((start, stop) for start, stop in ((0, front), (seqlen - behind, seqlen)) if start < stop)
    kept = ((max(start, asking.start) - asking.start, min(stop, asking.stop) - asking.start) for start, stop in keys)
    return MustKeep(keys=keys, queries=tuple((start, stop) for start, stop in kept if start < stop)) if keys else None
