"""What the quality lab says in the end: tables of the least, the mean and the largest over cases, and the plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from .quality_candidates import CANDIDATES, PARTS
from .quality_cases import CHOOSING, REPORTING
from .quality_metrics import interpolate
from .quality_plan import DONOR, FEWER, LITE, PEER, THRESHOLD

SHARES = (10, 20, 25, 30, 35, 40, 45)
"""Skipped shares in per cent at which curves are compared."""
ATTENTION_SHARE = 0.6
"""Of a step's time, for the comparison with fewer steps where the rest of a step counts."""
ALLOWED_LOSS = 0.3
"""dB by which a candidate may be below error budgets that skip as much."""
HALVES = (CHOOSING, REPORTING)


def cases_of(rows: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in rows))


def at(rows: list[dict], case: str, method: str, share: float, key: str = "psnr_db") -> float | None:
    """A method's figure at a skipped share (0..1) of one case, interpolated; None where its curve does not reach.

    Error budgets over the logarithm of the share: their curves sag below a straight line between distant points, which
    would flatter them. The others' do not.
    """
    points = [(r["skipped"], r[key]) for r in rows if (r["case"], r["method"]) == (case, method)
              and r[key] is not None and r["skipped"] > 0]
    if method != LITE:
        return interpolate(points, share)
    return interpolate([(math.log(x), y) for x, y in points], math.log(share)) if share > 0 else None


def lead(rows: list[dict], case: str, share: float, method: str, over: str, key: str = "psnr_db",
         over_share: float | None = None) -> float | None:
    """How far one curve is above another at a share, in dB; None where one does not reach.

    Args:
        over_share: the share of the other one, where it differs.
    """
    own, other = at(rows, case, method, share, key), at(rows, case, over, share if over_share is None else over_share,
                                                        key)
    return None if own is None or other is None else own - other


def has_lost(rows: list[dict], method: str) -> bool:
    """Whether a candidate is too far below error budgets on one case to go on (see `quality_plan`)."""
    leads = (lead(rows, r["case"], r["skipped"], method, LITE) for r in rows if r["method"] == method)
    return method in CANDIDATES and any(value is not None and value < -ALLOWED_LOSS for value in leads)


def spread(values: Iterable[float | None], form: str = ".1f") -> str:
    """"least / mean / largest (cases)" of what is there."""
    found = [v for v in values if v is not None]
    if not found:
        return ""
    parts = (min(found), sum(found) / len(found), max(found))
    return " / ".join(format(part, form) for part in parts) + f" ({len(found)})"


def markdown(columns: list[str], rows: list[list[object]]) -> str:
    """A table for the documentation."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [columns, ["---"] * len(columns), *rows])


def over_cases(rows: list[dict], figure: Callable[[str], float | None], form: str = ".1f") -> str:
    return spread((figure(case) for case in cases_of(rows)), form)


def frontier_section(rows: list[dict]) -> str:
    """PSNR of Sol-Attn and of error budgets at each share, and the lead, on one half."""
    return markdown(["skipped", "Sol-Attn, dB", "error budget, dB", "error budget above Sol-Attn, dB"], [
        [f"{share} %", *(over_cases(rows, lambda case, m=m, s=share: at(rows, case, m, s / 100)) for m in (PEER, LITE)),
         over_cases(rows, lambda case, s=share: lead(rows, case, s / 100, LITE, PEER), "+.1f")] for share in SHARES])


def fewer_section(rows: list[dict]) -> str:
    """Error budgets above dense runs of fewer steps, at the same attention and at the same time."""
    def line(share: float) -> list[str]:
        equal = (lambda c: at(rows, c, FEWER, share), lambda c: at(rows, c, LITE, share))
        leads = (lambda c: lead(rows, c, share, LITE, FEWER),
                 lambda c: lead(rows, c, share, LITE, FEWER, over_share=ATTENTION_SHARE * share),
                 lambda c: lead(rows, c, share, LITE, FEWER, "psnr_db_long"))
        return [f"{share:.0%}".replace("%", " %"), *(over_cases(rows, f) for f in equal),
                *(over_cases(rows, f, "+.1f") for f in leads)]

    return markdown(["attention saved", "fewer steps, dB", "error budget, dB", "error budget above fewer steps",
                     f"where attention is {ATTENTION_SHARE:.0%} of a step".replace("%", " %"),
                     "against the run of three times the steps"], [line(s / 100) for s in SHARES])


def settings_section(rows: list[dict]) -> str:
    """What each value of the two rules skips and costs."""
    lines = []
    for method in (LITE, THRESHOLD):
        for level in sorted({r["level"] for r in rows if r["method"] == method}):
            own = [r for r in rows if (r["method"], r["level"]) == (method, level)]
            lines.append([f"{method} {level:g}", spread((100 * r["skipped"] for r in own), ".0f"),
                          *(spread(r[key] for r in own) for key in ("psnr_db", "psnr_db_worst_frame",
                                                                    "motion_psnr_db")),
                          spread((None if r["quiet_motion"] is None else 100 * r["quiet_motion"] for r in own), "+.0f"),
                          spread((lead(rows, r["case"], r["skipped"], method, FEWER) for r in own), "+.1f")])
    return markdown(["setting", "skipped, %", "PSNR, dB", "worst frame, dB", "motion, dB", "quiet areas, %",
                     "above fewer steps, dB"], lines)


def against_section(rows: list[dict], methods: Iterable[str]) -> str:
    """Each method at its own shares against error budgets at the same share."""
    lines = []
    for method in methods:
        own = [r for r in rows if r["method"] == method]
        if own:
            lines.append([method, spread((100 * r["skipped"] for r in own), ".0f"),
                          spread((lead(rows, r["case"], r["skipped"], method, LITE) for r in own), "+.1f")])
    return markdown(["", "skipped, %", "above error budgets that skip as much, dB"], lines)


def donor_section(rows: list[dict]) -> str:
    """Masks of a donor by number of steps and budget."""
    lines = []
    for steps in sorted({r["steps"] for r in rows if r["method"] == DONOR}):
        for level in sorted({r["level"] for r in rows if r["method"] == DONOR}):
            own, plain = ([r for r in rows if (r["method"], r["steps"], r["level"]) == (m, steps, level)]
                          for m in (DONOR, LITE))
            given = {r["case"] for r in own}
            lines.append([steps, f"{level:g}", spread((100 * r["skipped"] for r in plain if r["case"] in given), ".0f"),
                          spread((100 * r["skipped"] for r in own), ".0f"),
                          spread((lead(rows, r["case"], r["skipped"], DONOR, LITE) for r in own), "+.1f")])
    return markdown(["steps", "budget", "skipped, %", "with a donor's masks, %",
                     "above budgets that skip as much, dB"], lines)


def sections(rows: list[dict]) -> dict[str, str]:
    """The tables of docs/quality.md by name."""
    by_half = {half: [r for r in rows if r["half"] == half] for half in HALVES}
    return {**{f"frontier, {half} half": frontier_section(own) for half, own in by_half.items()},
            "fewer steps": fewer_section(by_half[REPORTING]), "settings": settings_section(by_half[REPORTING]),
            "parts": against_section(by_half[CHOOSING], PARTS),
            "candidates": against_section(by_half[CHOOSING], CANDIDATES), "donor": donor_section(rows)}


def plot(rows: list[dict], path: Path) -> str:
    """PSNR over the share of attention that is not computed: a panel for each case, a curve for each method.

    Returns:
        One line that says where the picture is, or how to get one.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "No plot: matplotlib is not installed (pip install matplotlib)."
    cases = cases_of(rows)
    if not cases:
        return "No plot: nothing ran."
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, sharex=True,
                                   sharey=True)
    for axis, case in zip(axes.flat, cases, strict=False):
        for method, style in ((LITE, "o-"), (THRESHOLD, "s--"), (PEER, "^-"), (FEWER, "x:")):
            line = sorted((100 * r["skipped"], r["psnr_db"]) for r in rows
                          if (r["case"], r["method"]) == (case, method) and r["psnr_db"] is not None)
            if line:
                axis.plot(*zip(*line, strict=True), style, label=method, markersize=4)
        axis.set_title(case, fontsize=7)
        axis.set(xlim=(0, 60), ylim=(15, 65))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("attention not computed, %")
    figure.supylabel("PSNR against dense, dB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"Plot: {path.name}"
