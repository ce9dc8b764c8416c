"""Loads the pack from its location as `liteattention`."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from load_pack import load_pack  # noqa: E402

load_pack()


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The folder of the tiny demo model."""
    return ROOT / "demo" / "model"


def pytest_terminal_summary(terminalreporter):
    """One line with what tests have counted: `record_property("counted", (what, how many, seed or None))`."""
    counts, seeds = {}, {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "counted" and report.when == "call" and report.passed:
                what, number, seed = value
                counts[what] = counts.get(what, 0) + number
                seeds[what] = "" if seed is None else f" (seed {seed})"
    if counts:
        terminalreporter.write_line(", ".join(f"{what}: {number}{seeds[what]}" for what, number in counts.items()))


os.environ.pop("LITEATTENTION_BACKEND", None)
# The tensors are small: on a busy machine torch's threads wait for each other, up to a hundred times as long.
torch.set_num_threads(1)
