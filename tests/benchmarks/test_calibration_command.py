"""The calibration benchmark: small from end to end, and what its committed result says."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_quick_from_end_to_end(script, tmp_path):
    out = tmp_path / "2026-01-01-calibration.json"
    arguments = "--quick --steps 4 --few-steps 3 --target 0.1 --limit 0.2 --lowest -3 --grid 0.5 --out".split()
    done = subprocess.run([sys.executable, script("calibration").__file__, *arguments, out], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["finished"] and result["calibration"]["worst_error"] <= 0.1
    assert result["calibration"]["extra_evaluations_per_call"] <= 2
    rows = [row for row in result["rows"] if row["with"] == "profile"]
    assert [row["steps"] for row in rows] == [4] * 4 + [3] * 4 and len({row["case"] for row in rows}) == 4
    assert all(row["calls"] == 5 * row["steps"] for row in rows)
    verdict = result["verdict"]
    assert verdict["within_limit"] == (verdict["profile"]["worst_error"] <= 0.2)
    assert "threshold" in done.stdout


def test_the_committed_result_keeps_the_promise_and_the_page_shows_it():
    path, = (ROOT / "benchmarks" / "results").glob("*-calibration.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    verdict = result["verdict"]
    assert (result["target"], result["limit"], result["steps"]) == (0.02, 0.03, 20)
    assert verdict["within_limit"] and verdict["skips_more"]
    assert result["calibration"]["case"] not in {row["case"] for row in result["rows"]}
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for row in (verdict["profile"], verdict["profile_few_steps"], verdict["best_single"]):
        assert f"| {row['steps']} | {row['skipped']:.1%} | {row['worst_error']:.4f} |".replace("%", " %") in page
    assert f"| {verdict['best_single']['with']}, the best single one" in page
