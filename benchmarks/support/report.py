"""What a run leaves behind: a JSON file that is complete after every row, tables, and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch


def driver_version() -> str | None:
    """The NVIDIA driver's, or None."""
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def without_folders(text: str) -> str:
    """`text` with absolute paths shortened to their last part: results are published, machines are not."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+@-]+/)+(?=[\w.+@-])", "", text)


def plain(error: object, limit: int = 300) -> str:
    """One line of an error message, without folders."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return without_folders(" ".join(text.split()))[:limit]


def command_line(script: str) -> str:
    """The command that was given, as one may repeat it: paths by their last part."""
    return " ".join(["python", f"benchmarks/{script}", *(without_folders(a) for a in sys.argv[1:])])


def device_name(device: torch.device) -> str:
    """"NVIDIA H200", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def result_name(device: torch.device, what: str) -> str:
    """"2026-11-21-h200-attention.json": date, device, what was measured."""
    words = re.split(r"[^a-z0-9]+", device_name(device).lower())
    words = [word for word in words if word not in ("", "nvidia", "geforce", "amd")]
    return f"{datetime.date.today().isoformat()}-{'-'.join(words)}-{what}.json"


def environment(script: str, device: torch.device) -> dict:
    """Date, command, device, driver and versions: the head of every result."""
    return {"command": command_line(script), "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "device": device_name(device), "driver": driver_version() if device.type == "cuda" else None,
            "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "triton": _version("triton"), "numpy": _version("numpy"), "python": platform.python_version(),
            "machine": platform.machine(), "threads": torch.get_num_threads()}


def without_nan(value: object) -> object:
    """The same with None for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report:
    """A result on disk. Every change is written at once and atomically, so that a killed run has lost nothing.

    Args:
        path: of the JSON file, or None to keep it in memory only.
        resume: keep the rows that are there.
        head: as `environment` gives it, with whatever describes the run.
    """

    def __init__(self, path: Path | None, head: dict, resume: bool = False):
        self.path = path
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if resume and path and path.exists() else []
        self.content = {**head, "finished": False, "rows": rows}
        self.save()

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    def add(self, *rows: dict) -> None:
        """More rows."""
        self.rows.extend(rows)
        self.save()

    def set(self, **values: object) -> None:
        """Further entries beside the rows."""
        self.content.update(values)
        self.save()

    def finish(self, **values: object) -> None:
        """The run went through to its end."""
        self.set(finished=True, **values)

    def save(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(without_nan(self.content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as aligned text. `columns`: key in the row -> heading."""
    cells = [list(columns.values())] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) if i == 0 else text.rjust(width)
                               for i, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in cells)


def plot_speedups(rows: list[dict], path: Path, title: str) -> str:
    """Speed-up over the best SDPA against the skipped share, one panel per shape, with the line 1 / (1 - s).

    Returns:
        One line that says where the picture is, or how to get one.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "No plot: matplotlib is not installed (pip install matplotlib)."
    timed = [r for r in rows if r.get("speedup_over_sdpa") and r["form"] != "dense"]
    shapes = sorted({(r["head_dim"], r["tokens"], r["heads"]) for r in timed}, key=lambda s: (-s[0], s[1]))
    if not shapes:
        return "No plot: nothing was timed."
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(4.2 * len(shapes), 4.2), squeeze=False)
    for axis, (head_dim, tokens, heads) in zip(axes[0], shapes, strict=True):
        ideal = [s / 100 for s in range(0, 80)]
        axis.plot([100 * s for s in ideal], [1 / (1 - s) for s in ideal], "k--", linewidth=1, label="1 / (1 - s)")
        here = [r for r in timed if (r["head_dim"], r["tokens"]) == (head_dim, tokens)]
        for name in dict.fromkeys(r["contender"] for r in here if r["form"] != "unskipped"):
            # A mask with every tile is the reader's point at 0 %.
            names = {name, name.replace("read", "unskipped")}
            points = sorted({r["skipped"]: r["speedup_over_sdpa"] for r in here if r["contender"] in names
                             and (r["form"] != "unskipped" or r["skipped"] == 0)}.items())
            axis.plot([100 * s for s, _ in points], [x for _, x in points], marker="o", label=name)
        axis.axhline(1.0, color="grey", linewidth=0.5)
        axis.set(title=f"{tokens} tokens, {heads} heads, D = {head_dim}", xlabel="tiles skipped, %")
    axes[0][0].set_ylabel("speed-up over the best SDPA")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"Plot: {path.name}"
