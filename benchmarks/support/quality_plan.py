"""Which settings the quality lab runs, on which cases, and in which order.

Decided before any candidate ran: a candidate of `quality_candidates` goes into the pack if, against error budgets that
skip as much, no case of the choosing half is more than 0.3 dB worse, the case with the least lead over Sol-Attn is at
least 1 dB better, and the reporting half confirms both. What has lost one case is not run on; docs/quality.md names it.
"""

from __future__ import annotations

from collections.abc import Callable

from .quality_candidates import BY_ERROR, CANDIDATES, PARTS
from .quality_cases import CHOOSING, Case
from .quality_runs import Setting

LITE, PEER, FEWER, THRESHOLD, DONOR = "error budget", "Sol-Attn", "fewer steps", "threshold", "donor's masks"
BUDGETS, BOLDER = (0.3, 0.6, 1.0), (2.0, 4.0)
"""The node offers those of the first kind, the others are of the method."""
FEW = 8
"""Steps up to which runs are those of distilled models: these need bolder settings to skip as much."""
TAUS, MORE_TAUS = (-0.8, 0.1), (-1.8,)
THRESHOLDS = (-3.0, -1.5)
FEWER_SHARES = (0.95, 0.9, 0.75, 0.55)
"""Of the steps, for the dense runs of fewer steps."""


def boldness(case: Case) -> tuple[float, float]:
    """Two budgets for a candidate, at which error budgets are measured, too: between two points the straight line is
    above their curve."""
    return (1.0, 2.0) if case.steps <= FEW else (0.6, 1.0)


def compared(case: Case) -> list[Setting]:
    """Error budgets and fewer steps."""
    fewer = sorted({round(case.steps * share) for share in FEWER_SHARES} - {case.steps}, reverse=True)
    budgets = (*BUDGETS, *BOLDER[:case.steps <= FEW])
    return [*(Setting(LITE, "budget", x) for x in budgets), *(Setting(FEWER, "dense", x) for x in fewer)]


def peer(case: Case) -> list[Setting]:
    """Sol-Attn."""
    return [Setting(PEER, "sol", x) for x in TAUS]


def longer(case: Case) -> list[Setting]:
    """Further points of both curves."""
    return [*(Setting(PEER, "sol", x) for x in MORE_TAUS),
            *(Setting(LITE, "budget", x) for x in BOLDER[case.steps <= FEW:][:1])]


def tried(cases: list[Case], bold: int) -> list[tuple[Case, Setting]]:
    """Candidates at one of two budgets, on the choosing half, one candidate after the other."""
    return [(case, Setting(name, "simulation", (0.03, 0.06)[bold] if name == BY_ERROR else boldness(case)[bold]))
            for name in CANDIDATES for case in cases if case.half == CHOOSING]


def donated(case: Case) -> list[Setting]:
    """Masks of a donor, where the case has one."""
    return [Setting(DONOR, "donor", x) for x in (0.3, 1.0, 2.0) if case.donor]


def others(case: Case) -> list[Setting]:
    """The other rule on every case, and the method without each of its parts on the choosing half."""
    return [*(Setting(THRESHOLD, "threshold", x) for x in THRESHOLDS),
            *(Setting(name, "simulation", boldness(case)[0]) for name in PARTS if case.half == CHOOSING)]


def plan(cases: list[Case]) -> list[tuple[Case, Setting]]:
    """Pairs to run, what matters most first."""
    def each(part: Callable[[Case], list[Setting]]) -> list[tuple[Case, Setting]]:
        return [(case, setting) for case in cases for setting in part(case)]

    return [*each(compared), *each(peer), *tried(cases, 0), *each(donated), *each(longer), *each(others),
            *tried(cases, 1)]
