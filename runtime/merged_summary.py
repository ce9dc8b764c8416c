"""One run in several processes: the summaries of all ranks as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean
from typing import Any

from .reasons import Reason
from .summary import RunSummary
from .timing import TimeSaved
from .words import ENGLISH, words


@dataclass(frozen=True)
class MergedSummary(RunSummary):
    """Attributes:
        ranks: skipped share of each rank, 0..1; the run is as fast as the rank that skips least.
    """

    ranks: list[float] = field(default_factory=list)

    def lines(self, language: str = ENGLISH) -> list[str]:
        say, (first, *others) = words(language), super().lines(language)
        shares = ", ".join(f"{share:.1%}" for share in self.ranks)
        return [first, say("ranks: skipped {shares}", shares=shares), *others]


def merged(summaries: Sequence[RunSummary]) -> MergedSummary:
    """The summary of a run whose ranks computed different heads or rows, in equal numbers.

    Tiles, masks and calls are summed; times are those of the slowest rank. A note that not every rank has names those
    that have it.

    Args:
        summaries: by rank.
    """
    first = summaries[0]

    def every(value: Callable[[RunSummary], Any]) -> list:
        return [value(summary) for summary in summaries]

    calls: Counter[Reason] = Counter()
    for summary in summaries:
        calls.update(summary.dense_calls)
    unreached = first.unreached if all(every(lambda s: s.unreached)) else ""
    values = {f.name: getattr(first, f.name) for f in fields(RunSummary)} | {
        "steps_done": min(every(lambda s: s.steps_done)), "dense_calls": dict(calls),
        "skipped_per_step": _means(every(lambda s: s.skipped_per_step)),
        "layers": {name: _means([s.layers[name] for s in summaries if name in s.layers])
                   for name in _once(name for s in summaries for name in s.layers)},
        "backend": ", ".join(_once(filter(None, every(lambda s: s.backend)))),
        "fallback": " and ".join(_once(filter(None, every(lambda s: s.fallback)))),
        "break_evens": [known for rank, s in enumerate(summaries) for known in s.break_evens
                        if all(known not in other.break_evens for other in summaries[:rank])],
        "saved": _slowest(every(lambda s: s.saved)), "unreached": unreached,
        "notes": _notes([[*s.notes, *([s.unreached] if s.unreached and not unreached else [])] for s in summaries]),
        "advice": _once(advice for s in summaries for advice in s.advice),
        "environment": {name: ", ".join(_once(s.environment.get(name, "unknown") for s in summaries))
                        for name in first.environment}}
    for name in ("sparse_calls", "tiles_computed", "tiles_total", "dense_tiles", "mask_bytes", "carried_bytes"):
        values[name] = sum(every(lambda s, name=name: getattr(s, name)))
    for name in ("forward_passes", "tokens", "seconds"):
        values[name] = max((v for v in every(lambda s, name=name: getattr(s, name)) if v is not None), default=None)
    return MergedSummary(**values, ranks=every(lambda s: s.skipped))


def to_plain(summary: RunSummary) -> dict:
    """A summary as values that another process reads without this pack's classes."""
    calls = [(asdict(reason), count) for reason, count in summary.dense_calls.items()]
    return {**asdict(replace(summary, dense_calls={})), "dense_calls": calls}


def from_plain(plain: dict) -> RunSummary:
    """The summary that `to_plain` was given.

    Raises:
        TypeError: it comes from another version of the pack.
    """
    saved = plain["saved"]
    return RunSummary(**{**plain, "dense_calls": {Reason(**reason): count for reason, count in plain["dense_calls"]},
                         "saved": None if saved is None else TimeSaved(**saved)})


def _once(values: Iterable[Hashable]) -> list:
    return list(dict.fromkeys(values))


def _means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Over the ranks, step by step, of the shares that are known: tiles are equal by rank."""
    known = [[row[step] for row in rows if step < len(row) and row[step] is not None]
             for step in range(max(map(len, rows), default=0))]
    return [fmean(shares) if shares else None for shares in known]


def _slowest(saved: Sequence[TimeSaved | None]) -> TimeSaved | None:
    """None where a rank has not timed its attention."""
    if None in saved:
        return None
    return TimeSaved(max(s.dense_seconds for s in saved), max(s.sparse_seconds for s in saved), saved[0].source)


def _notes(by_rank: Sequence[Sequence[str]]) -> list[str]:
    """Each once, with the ranks in front that have it where not all have."""
    holders = {note: [rank for rank, notes in enumerate(by_rank) if note in notes]
               for note in _once(note for notes in by_rank for note in notes)}
    return [note if len(ranks) == len(by_rank) else
            f"rank {', '.join(map(str, ranks))}: {note}"
            for note, ranks in holders.items()]
