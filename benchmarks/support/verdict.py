"""The targets for one H200, and whether a run's rows meet them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHORT = 16384
"""Tokens. The smallest length that the targets without a length of their own speak of: video runs have more."""


@dataclass(frozen=True)
class Target:
    """`at_least`, `aim`: bounds of the figure; with `lower`, smaller is better and they are upper bounds."""

    figure: str
    at_least: float
    aim: float
    lower: bool = False


TARGETS = (
    Target("dense loop: speed / cuDNN SDPA", 0.75, 0.90),
    Target("list loop over dense loop: time", 1.03, 1.01, lower=True),
    Target("recording over reading, equal tiles: time", 1.06, 1.03, lower=True),
    Target("efficiency t(0)(1-s)/t(s), N >= 32k", 0.95, 0.97),
    Target("efficiency t(0)(1-s)/t(s), N = 16k", 0.92, 0.94),
    Target("efficiency t(0)(1-s)/t(s), N = 8k", 0.85, 0.87),
    Target("speed-up over cuDNN at 42 %, reading", 1.3, 1.6),
    Target("speed-up over cuDNN at 57 %, reading", 1.8, 2.2),
    Target("speed-up over cuDNN at 77 %, reading", 3.2, 4.0),
    Target("speed-up over cuDNN at 42 %, recording", 1.3, 1.6),
    Target("speed-up over cuDNN at 57 %, recording", 1.8, 2.2),
    Target("speed-up over cuDNN at 77 %, recording", 3.2, 4.0),
)


def group_key(row: dict) -> tuple:
    """Rows with the same key were timed in turns on the same tensors: ratios are made within it only."""
    return row["head_dim"], row["dtype"], row["tokens"], row["heads"], row["sparsity"]


def groups(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """Timed rows by group and contender."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row.get("median_ms"):
            found.setdefault(group_key(row), {})[row["contender"]] = row
    return found


def add_ratios(rows: list[dict]) -> None:
    """Put the ratios of one group into its rows: over the best SDPA, over our dense loop, over reading, efficiency."""
    for members in groups(rows).values():
        sdpa = [r["median_ms"] for name, r in members.items() if name.startswith("sdpa")]
        for row in members.values():
            took = row["median_ms"]
            row["speedup_over_sdpa"] = min(sdpa) / took if sdpa else None
            form, _, precision = row["contender"].partition(" ")
            listed, dense = members.get(f"list {precision}"), members.get(f"dense {precision}")
            read = members.get(f"read {precision}") or (listed if row["sparsity"] == 0 else None)
            if form == "list" and dense:
                row["over_dense_loop"] = took / dense["median_ms"]
            if form == "record" and read:
                row["over_reading"] = took / read["median_ms"]
            if form in ("read", "record") and listed and row["sparsity"]:
                row["efficiency"] = listed["median_ms"] * (1 - row["skipped"]) / took


def _figures(rows: list[dict], precision: str) -> dict[str, list[tuple[float, str]]]:
    """Every measured value of each target's figure, with where it was measured."""
    values: dict[str, list[tuple[float, str]]] = {t.figure: [] for t in TARGETS}
    names = [t.figure for t in TARGETS]
    for (head_dim, _, tokens, _, sparsity), members in groups(rows).items():
        if head_dim != 128:
            continue
        where = f"N = {tokens}" + (f", s = {sparsity:g}" if sparsity else "")
        dense, listed, read, record = (members.get(f"{form} {precision}")
                                       for form in ("dense", "list", "read", "record"))
        cudnn = members.get("sdpa cudnn")
        if tokens >= SHORT:
            if dense and cudnn:
                values[names[0]].append((cudnn["median_ms"] / dense["median_ms"], where))
            if listed and "over_dense_loop" in listed:
                values[names[1]].append((listed["over_dense_loop"], where))
            if record and "over_reading" in record:
                values[names[2]].append((record["over_reading"], where))
            for word, row in (("reading", read), ("recording", record)):
                figure = f"speed-up over cuDNN at {round(100 * sparsity)} %, {word}"
                if row and cudnn and figure in values:
                    values[figure].append((cudnn["median_ms"] / row["median_ms"], where))
        if read and "efficiency" in read:
            size = names[3] if tokens >= 32000 else names[4] if tokens >= SHORT else names[5]
            if tokens >= 8000:
                values[size].append((read["efficiency"], where))
    return values


def verdicts(rows: list[dict], precision: str = "full") -> list[dict]:
    """One row per target: the worst measured value over all shapes with D = 128, and what it comes to.

    `verdict`: "aim", "met" (at least, but not the aim), "MISSED", or "not measured".
    """
    table = []
    for target in TARGETS:
        values = _figures(rows, precision)[target.figure]
        row = {"figure": target.figure, "measured": None, "where": "", "at_least": target.at_least, "aim": target.aim,
               "verdict": "not measured"}
        if values:
            sign = -1 if target.lower else 1
            row["measured"], row["where"] = min(values, key=lambda v: sign * v[0])
            if sign * row["measured"] >= sign * target.aim:
                row["verdict"] = "aim"
            else:
                row["verdict"] = "met" if sign * row["measured"] >= sign * target.at_least else "MISSED"
        table.append(row)
    return table
