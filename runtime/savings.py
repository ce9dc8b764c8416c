"""Attention time that a run has saved: from calls that were timed, else from its tiles."""

from __future__ import annotations

from dataclasses import dataclass

from .dispatch import Dispatcher
from .statistics import Statistics


@dataclass(frozen=True)
class Saved:
    """Against the same run with every self-attention call over the video's tokens dense.

    Attributes:
        share: of the time of those calls; below 0 where the run was slower.
        dense_seconds, lite_seconds: their time if all were dense, and as the run was; None if nothing was timed.
        source: "timed calls" (both attentions between events, one at a time), "log_details" (every call of the run) or
            "tiles" (an estimate: time in proportion to the tiles computed, and equal to dense at the break-even).
    """

    share: float
    dense_seconds: float | None = None
    lite_seconds: float | None = None
    source: str = "tiles"

    @classmethod
    def of(cls, dense_seconds: float, lite_seconds: float, source: str) -> Saved:
        return cls(1 - lite_seconds / dense_seconds, dense_seconds, lite_seconds, source)

    def text(self) -> str:
        """For the receipt."""
        if self.dense_seconds is None or self.lite_seconds is None:
            return f"attention time saved: about {self.share:.0%} (estimated from tiles, not timed)"
        return (f"attention: {self.lite_seconds:.2f} s instead of about {self.dense_seconds:.2f} s "
                f"({-self.share:+.0%}, from {self.source})")

    def short_text(self) -> str:
        """For the text of a step."""
        if self.share < 0:  # the recording step costs before anything is skipped
            return f"{-self.share:.0%} more attention time so far"
        if self.dense_seconds is None or self.lite_seconds is None:
            return f"~{self.share:.0%} of attention time saved"
        return f"{self.dense_seconds - self.lite_seconds:.1f} s ({self.share:.0%}) of attention saved"


def saved(books: Statistics, dispatcher: Dispatcher) -> Saved | None:
    """What the closed steps have saved, or None where no self-attention over the video's tokens ran. No
    synchronisation."""
    total, taken = books.tiles_total, books.taken_total
    if not total:
        return None
    timed = dispatcher.tile_seconds()
    if timed is not None:
        dense, ours = timed
        return Saved.of(dense * total, dense * (total - taken) + ours * books.taken_computed, "timed calls")
    dense_seconds, dense_tiles = books.dense_seconds + books.sampled_seconds, books.dense_tiles + books.sampled_tiles
    if dense_tiles and dense_seconds > 0 and taken:
        return Saved.of(dense_seconds / dense_tiles * total, books.seconds, "log_details")
    return Saved((taken - books.taken_computed / dispatcher.break_even()) / total)
