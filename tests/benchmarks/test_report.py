"""Results on disk, ratios, timing: no times are asserted."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from support.report import Report, cell, environment, plain, plot_speedups, result_name, table, without_folders
from support.timing import Timing, interleaved

CPU = torch.device("cpu")


def row(contender, median_ms, sparsity=0.0, tokens=32768, head_dim=128):
    form, _, precision = contender.partition(" ")
    return {"head_dim": head_dim, "dtype": "bfloat16", "tokens": tokens, "heads": 24, "sparsity": sparsity,
            "contender": contender, "form": form, "precision": precision, "median_ms": median_ms,
            "skipped": sparsity if form in ("read", "record", "default") else 0.0}


@pytest.fixture
def rows_of_a_run(script):
    groups = ([row("sdpa cudnn", 1.0), row("sdpa flash", 1.6), row("unskipped full", 1.22), row("record full", 1.25),
               row("default full", 1.3)],
              [row("sdpa cudnn", 1.0, 0.57), row("unskipped full", 1.22, 0.57), row("read full", 0.55, 0.57),
               row("record full", 0.56, 0.57), row("default full", 0.6, 0.57)])
    for group in groups:
        script("attention").add_ratios(group)
    return [*groups[0], *groups[1]]


def test_ratios_are_made_within_a_group(rows_of_a_run):
    at_0, at_57 = rows_of_a_run[2:5], rows_of_a_run[6:]
    assert at_0[0]["speedup_over_sdpa"] == pytest.approx(1 / 1.22)
    assert at_0[1]["over_reading"] == pytest.approx(1.25 / 1.22)
    assert [r["over_reading"] for r in at_57[2:]] == pytest.approx([0.56 / 0.55, 0.6 / 0.55])
    assert [r["efficiency"] for r in at_57[1:]] == pytest.approx([1.22 * 0.43 / ms for ms in (0.55, 0.56, 0.6)])
    assert "efficiency" not in at_0[0] and "over_reading" not in at_57[0]


def test_a_row_without_a_time_takes_no_part(script):
    rows = [{**row("sdpa cudnn", None), "problem": "wrong output"}, row("unskipped full", 1.22), row("read full", 1.2)]
    script("attention").add_ratios(rows)
    assert rows[1]["speedup_over_sdpa"] is None and "efficiency" not in rows[2]


def test_results_are_whole_after_every_row_and_can_be_resumed(tmp_path):
    path = tmp_path / "a" / "result.json"
    report = Report(path, environment("attention.py", CPU))
    report.add({"contender": "sdpa"})
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held["rows"] == [{"contender": "sdpa"}] and held["finished"] is False
    for key in ("command", "date", "device", "driver", "torch", "triton", "numpy", "python"):
        assert key in held
    assert held["command"].startswith("python benchmarks/attention.py")
    Report(path, environment("attention.py", CPU), resume=True).finish()
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held["rows"] == [{"contender": "sdpa"}] and held["finished"] is True
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_nan_becomes_null(tmp_path):
    Report(tmp_path / "r.json", {}).add({"error": float("nan"), "deep": [{"x": float("inf")}], "fine": 1.5})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"] == [
        {"error": None, "deep": [{"x": None}], "fine": 1.5}]


def test_machines_are_not_named():
    assert without_folders("--json=/some/where/x.json") == "--json=x.json"
    assert without_folders("cannot open /a/b.c/d-e.py, line 3; see https://host/a/b") == (
        "cannot open d-e.py, line 3; see https://host/a/b")
    assert plain(ValueError("a\n b")) == "ValueError: a b" and len(plain("x" * 999)) == 300
    assert result_name(CPU, "attention").endswith("-cpu-attention.json")


def test_tables_line_up():
    text = table([{"a": "x", "b": 1.23456}, {"a": "longer", "b": None}], {"a": "name", "b": "value"})
    assert text.splitlines() == ["name    value", "x       1.235", "longer      -"]
    assert cell(1.5e-4) == "1.5e-04" and cell(0.0) == "0.000" and cell(7) == "7"


def test_a_plot_or_one_line_how_to_get_it(tmp_path, rows_of_a_run):
    said = plot_speedups(rows_of_a_run, tmp_path / "x.png", "a GPU")
    assert "\n" not in said
    assert (tmp_path / "x.png").is_file() if said == "Plot: x.png" else "matplotlib" in said


def test_functions_take_turns_and_one_that_fails_is_left_out():
    calls = []

    def fails():
        calls.append("c")
        raise RuntimeError("no")

    times, failed = interleaved({"a": lambda: calls.append("a"), "c": fails, "b": lambda: calls.append("b")}, CPU,
                                seconds=0.0, min_rounds=3, max_rounds=3)
    assert calls == ["a", "c", "b"] + ["a", "b"] * 3
    assert times["a"].rounds == times["b"].rounds == 3 and failed == {"c": "RuntimeError: no"}
    assert asdict(Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])) == {"median_ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0, "rounds": 5}


def test_a_deadline_ends_the_rounds():
    times, _ = interleaved({"a": lambda: time.sleep(0.001)}, CPU, seconds=9.0, deadline=time.monotonic())
    assert times["a"].rounds == 1


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_killed_run_leaves_its_rows(tmp_path, script):
    path = tmp_path / "2026-01-01-cpu-attention.json"
    child = subprocess.Popen([sys.executable, script("attention").__file__, "--device", "cpu", "--tokens", "300",
                              "--budget", "60", "--json", str(path)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("default full"):  # the first group is on the screen
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held["finished"] is False and held["running"] and str(tmp_path) not in path.read_text(encoding="utf-8")
    assert {"sdpa", "unskipped full", "record full", "default full"} <= {r["contender"] for r in held["rows"]}
    assert all(r["median_ms"] > 0 for r in held["rows"])
