"""Which attention of a block a call is, and which part of it: nodes that save memory call once per group of heads, or
once per piece of the queries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ..kernels import TILE
from .call import AttentionCall


class Site(NamedTuple):
    """A self-attention over the video's tokens, or a part of one.

    Attributes:
        ordinal: which self-attention of its block.
        heads, all_heads: heads of this call, and of the whole attention.
        queries: tokens that ask, of the whole sequence.
        piece: number of the piece of the queries. adds_up: whether the pieces are known to be the whole sequence.
    """

    ordinal: int
    heads: range
    all_heads: int
    queries: range
    piece: int = 0
    adds_up: bool = True

    @property
    def first(self) -> bool:
        """Whether the call stands for the whole attention where calls are counted."""
        return self.heads.start == 0 and self.piece == 0


@dataclass
class _Pieces:
    """Pieces of an attention that is not complete. `keys`: identity of k and v; `last`: address of the last queries."""

    keys: tuple[int, ...]
    lengths: list[int] = field(default_factory=list)
    last: tuple[int, int] = (0, 0)


class Sites:
    """Numbers the self-attentions of each block in one forward pass.

    Pieces of the queries are served once the forward pass before has shown that they add up to the sequence in order.

    Args:
        all_heads: of an attention over the video, or None if unknown: then every group of heads is an attention.
        known: (block, sequence length, lengths of the pieces) of what has added up; shared by the passes of a run.
    """

    def __init__(self, all_heads: int | None, known: set[tuple[str, int, tuple[int, ...]]]):
        self._all_heads = all_heads
        self._known = known
        self._complete: Counter[str] = Counter()
        self._heads: Counter[str] = Counter()
        self._pieces: dict[str, _Pieces] = {}

    def is_group(self, block: str, heads: int) -> bool:
        """Whether a call of so many heads can be a part of the first attention of `block`."""
        return self._all_heads is not None and heads < self._all_heads and not self._complete[block]

    def whole(self, call: AttentionCall, block: str) -> Site:
        """The site of a call over all queries."""
        total = max(self._all_heads or 0, call.heads)
        if self._heads[block] + call.heads > total:  # the attention before has not called all of its heads
            self._close(block)
        heads = range(self._heads[block], self._heads[block] + call.heads)
        site = Site(self._complete[block], heads, total, range(call.seqlen_q))
        self._heads[block] = heads.stop
        if heads.stop == total:
            self._close(block)
        return site

    def _close(self, block: str) -> None:
        self._complete[block] += 1
        self._heads[block] = 0

    def piece(self, call: AttentionCall, block: str) -> Site:
        """The site of a call whose queries are a piece of the sequence of the keys."""
        keys = call.seqlen_k, call.k.data_ptr(), call.v.data_ptr()
        address = call.q.untyped_storage().data_ptr(), call.q.data_ptr()
        open_ = self._pieces.get(block)
        start = sum(open_.lengths) if open_ is not None else 0
        if (open_ is None or open_.keys != keys or start + call.seqlen_q > call.seqlen_k
                or (open_.last[0] == address[0] and open_.last[1] >= address[1])):
            open_, start = _Pieces(keys), 0
        open_.lengths.append(call.seqlen_q)
        open_.last = address
        self._pieces[block] = open_
        lengths = tuple(open_.lengths)
        adds_up = (self._all_heads or call.heads) == call.heads and any(
            at == block and seqlen == call.seqlen_k and plan[:len(lengths)] == lengths
            and not any(length % TILE for length in plan[:-1]) for at, seqlen, plan in list(self._known))
        site = Site(self._complete[block], range(call.heads), call.heads, range(start, start + call.seqlen_q),
                    len(lengths) - 1, adds_up)
        if start + call.seqlen_q == call.seqlen_k:
            self._known.add((block, call.seqlen_k, lengths))
            del self._pieces[block]
            self._complete[block] += 1
        return site
