"""The part of a model's calls that this process computes, where an engine runs one model in several processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from ..runtime import Reason, VideoTokens


@dataclass(frozen=True)
class Share:
    """Attributes:
        row_rank, row_ranks: place in the group of processes that split the rows of a batch, and how many they are.
        head_ranks: processes that split the heads of an attention.
        stays_dense: why no call of the model can be sparse, or None.
        unreached: what the run summary says where no self-attention arrived, from the run's transformer_options; None:
            what it says with one process.
    """

    row_rank: int = 0
    row_ranks: int = 1
    head_ranks: int = 1
    stays_dense: Reason | None = None
    unreached: Callable[[Mapping], str] | None = None

    def rows(self, names: list[Hashable] | None) -> list[Hashable] | None:
        """Of the names of a batch's rows, those that come here. The engine splits a batch of one row per process."""
        split = names is not None and self.row_ranks > 1 and len(names) == self.row_ranks
        return names[self.row_rank:self.row_rank + 1] if split else names

    def tokens(self, tokens: VideoTokens | int | None) -> VideoTokens | int | None:
        """The video's tokens in a call here, whose heads are a part of the model's."""
        if not isinstance(tokens, VideoTokens) or tokens.heads is None:
            return tokens
        return tokens._replace(heads=tokens.heads // self.head_ranks)


WHOLE = Share()
"""Of the only process."""
