"""What the quality lab says in the end: the frontier, how LiteAttention stands against Sol-Attn, and the plot."""

from __future__ import annotations

from pathlib import Path

from .quality_metrics import interpolate, mean_or_none
from .quality_plan import FEW

SHARES = tuple(range(20, 80, 5))
"""Skipped shares in per cent at which curves are compared."""
PEER, LITE = "Sol-Attn", "LiteAttention"
POINTS = {"method": "method", "level": "level", "cases": "cases", "skipped": "skipped", "psnr_db": "PSNR dB",
          "ssim": "SSIM", "error_mean": "rel. L2", "error_max": "largest", "dropped_mean": "dropped",
          "dropped_q999": "99.9 %", "seconds": "seconds"}


def points(rows: list[dict]) -> list[dict]:
    """Rows of the same method and level as one, each figure the mean over its cases."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["level"]), []).append(row)
    figures = [key for key in POINTS if key not in ("method", "level", "cases")]
    return [{"method": method, "level": level, "cases": len(group),
             **{key: sum(r[key] for r in group) / len(group) for key in figures}}
            for (method, level), group in groups.items()]


def psnr_at(rows: list[dict], method: str, share: int) -> float | None:
    """PSNR of a method at a skipped share (per cent): interpolated case by case, then the mean over all cases in
    `rows`; None where a case's curve does not reach."""
    cases = dict.fromkeys(r["case"] for r in rows if r["method"] == PEER) or dict.fromkeys(r["case"] for r in rows)
    return mean_or_none([interpolate([(r["skipped"], r["psnr_db"]) for r in rows
                                      if (r["case"], r["method"]) == (case, method)], share / 100) for case in cases])


def frontier(rows: list[dict]) -> list[dict]:
    """One row per share in `SHARES`: the PSNR of each method, the best LiteAttention curve's and its lead over
    Sol-Attn's in dB."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    found = []
    for share in SHARES:
        row = {"share": share, **{m: psnr_at(rows, m, share) for m in methods}}
        own = [row[m] for m in methods if m.startswith(LITE) and row[m] is not None]
        best, peer = max(own, default=None), row.get(PEER)
        found.append({**row, "best": best, "lead_db": best - peer if best is not None and peer is not None else None})
    return found


def frontier_columns(rows: list[dict]) -> dict[str, str]:
    """Columns of the frontier's table: curves that run on every case and reach two points."""
    counts: dict[str, set] = {}
    for row in rows:
        counts.setdefault(row["method"], set()).add(row["level"])
    shown = [m for m, levels in counts.items() if m == PEER or m.startswith(LITE) and len(levels) > 1]
    return {"share": "skipped %", **{m: m for m in shown}, "lead_db": "lead dB"}


def verdict(found: list[dict]) -> str:
    """How LiteAttention stands against Sol-Attn in one line."""
    leads = {row["share"]: row["lead_db"] for row in found if row["lead_db"] is not None}
    if not leads:
        return f"No comparison with {PEER}: it is absent, or no share is reached by both curves."
    worst = min(leads, key=leads.get)
    text = " ".join(f"{share}%: {lead:+.1f}" for share, lead in leads.items())
    return (f"The best LiteAttention curve against {PEER}'s, dB at a skipped share: {text}. "
            f"Least {leads[worst]:+.1f} dB at {worst} %, mean {sum(leads.values()) / len(leads):+.1f} dB.")


def markdown(columns: list[str], rows: list[list[object]]) -> str:
    """A table for the documentation; None is an empty cell."""
    lines = [columns, ["---"] * len(columns), *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def frontier_section(rows: list[dict]) -> str:
    """PSNR of the compared curves at each share."""
    columns = [m for m in frontier_columns(rows) if m not in ("share", "lead_db")]
    cells = [[f"{row['share']} %", *(None if row[m] is None else f"{row[m]:.1f}" for m in columns),
              None if row["lead_db"] is None else f"{row['lead_db']:+.1f}"] for row in frontier(rows)]
    return markdown(["skipped", *columns, "best LiteAttention against Sol-Attn"], cells)


def points_section(rows: list[dict], against: str | None = None) -> str:
    """Every point of these rows.

    Args:
        against: a method whose curve, at the same share and case, is put beside.
    """
    cells = []
    order = list(dict.fromkeys(r["method"] for r in rows))
    for p in sorted(points(rows), key=lambda p: (order.index(p["method"]), p["level"])):
        line = [p["method"], f"{p['level']:.4g}", f"{p['skipped']:.1%}", f"{p['psnr_db']:.1f}", f"{p['ssim']:.3f}",
                f"{p['error_mean']:.4f}", f"{p['dropped_mean']:.4f}"]
        if against is not None:
            cases = [r["case"] for r in rows if (r["method"], r["level"]) == (p["method"], p["level"])]
            other = mean_or_none([interpolate([(r["skipped"], r["psnr_db"]) for r in rows
                                               if (r["case"], r["method"]) == (c, against)], p["skipped"])
                                  for c in cases])
            line.append(None if other is None or p["method"] == against else f"{p['psnr_db'] - other:+.1f}")
        cells.append(line)
    columns = ["method", "level (log2)", "skipped", "PSNR dB", "SSIM", "rel. L2", "dropped"]
    return markdown(columns + ([f"dB against {against}"] if against else []), cells)


def sections(rows: list[dict]) -> dict[str, str]:
    """The tables of docs/quality.md that the rows of one result give, by name."""
    first = [r for r in rows if r["case"] == rows[0]["case"]]
    if rows[0]["steps"] <= FEW:
        few = [r for r in rows if "64" not in r["method"] and r["method"] != PEER]
        return {"few": points_section(few, f"{LITE}, tiles of 128")}
    settings = [r for r in first if r["method"].startswith(("max test", "max + pooled, tiles", "budget"))]
    parts = [r for r in first if r["tile"] == 64 and r["method"] != PEER]
    return {"frontier": frontier_section(rows), "verdict": verdict(frontier(rows)),
            "settings": points_section(settings), "parts": points_section(parts, f"{LITE}, tiles of 64")}


def plot(rows: list[dict], path: Path, title: str) -> str:
    """PSNR over skipped share, one curve per method, means over cases; in the second panel curves of the first case.

    Returns:
        One line that says where the picture is, or how to get one.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "No plot: matplotlib is not installed (pip install matplotlib)."
    if not rows:
        return "No plot: nothing ran."
    cases = list(dict.fromkeys(r["case"] for r in rows))
    everywhere = [p["method"] for p in points(rows) if p["cases"] == len(cases)]
    panels = [(f"mean over {len(cases)} cases", [r for r in rows if r["method"] in everywhere])][:len(cases) - 1]
    panels.append((cases[0], [r for r in rows if r["case"] == cases[0]]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels) + 2, 5), squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    names = list(dict.fromkeys(r["method"] for r in rows))
    lines = {name for name in names if len({r["level"] for r in rows if r["method"] == name}) > 1}
    for axis, (label, shown) in zip(axes[0], panels, strict=True):
        for number, name in enumerate(names):
            line = sorted((100 * p["skipped"], p["psnr_db"]) for p in points(shown) if p["method"] == name)
            if line and (name in lines or not lines):  # a point that lies on another curve needs no name
                strong = name == PEER or name.startswith(LITE)
                axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name, linewidth=2 if strong else 1,
                          linestyle="-" if strong else "--", color=colours[number % len(colours)])
        axis.set(title=label, xlabel="tiles skipped, %", ylabel="PSNR against dense, dB", xlim=(0, 85), ylim=(15, 65))
        axis.grid(alpha=0.3)
    axes[0][-1].legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc="center left",
                       bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"Plot: {path.name}"
