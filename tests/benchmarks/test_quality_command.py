"""The quality lab as a command, small."""

import json
import subprocess
import sys

import pytest
from safetensors import safe_open
from support.quality_plan import budgets, curves, plan
from support.quality_report import frontier, sections
from support.quality_runs import CASES, ROOT

PER_RUN = {"case", "method", "level", "tile", "kind", "steps", "skipped", "psnr_db", "ssim", "error_mean", "error_max",
           "dropped_mean", "dropped_q999", "seconds", "attention_seconds", "skipped_per_step", "skipped_per_layer",
           "measured_steps", "error_per_step", "error_per_layer"}


def started(script, *arguments):
    done = subprocess.run([sys.executable, script("quality").__file__, *map(str, arguments)], capture_output=True,
                          text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quick_from_end_to_end_and_resumed(script, tmp_path):
    arguments = ("--quick", "--device", "cpu", "--jobs", 1, "--out", tmp_path)
    started(script, *arguments, "--only", "oracle")
    said = started(script, *arguments, "--resume")
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.endswith("-quality-quick.json") and result["finished"]
    assert result["problems"] == [] and result["left_out"] == [] and result["command"].startswith("python benchmarks/q")
    rows = {r["method"]: r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == (6 if result["sol"].startswith("comfy-kitchen 0") else 5)
    assert ("Sol-Attn" in rows) != ("Sol-Attn is left out" in said)
    for r in rows.values():
        assert set(r) == PER_RUN and r["steps"] == 3 and len(r["skipped_per_step"]) == 3
        assert len(r["skipped_per_layer"]) == len(r["error_per_layer"]) == 5 and r["measured_steps"] == [1, 2]
        assert r["skipped_per_step"][0] == 0 and 0 < r["skipped"] < 1 and 0 < r["ssim"] <= 1
        assert r["skipped"] == pytest.approx(sum(r["skipped_per_step"]) / 3, abs=1e-5)
        assert 0 < r["error_mean"] <= r["error_max"] < 1 and 0 < r["dropped_mean"] <= r["dropped_q999"] <= 1
    assert len(result["points"]) == len(rows) and len(result["frontier"]) == 12 and "PSNR dB" in said


def test_without_time_it_names_what_it_left_out(script, tmp_path):
    said = started(script, "--quick", "--device", "cpu", "--jobs", 1, "--budget", -1, "--out", tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text(encoding="utf-8"))["left_out"]) >= 5 and "did not fit" in said


def test_trace(script, monkeypatch, tmp_path):
    from support import quality_runs

    path = tmp_path / "t.safetensors"
    said = quality_runs.trace(quality_runs.SMALL_CASES[0], 3, "cpu", [0, 2], [1], path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == [f"step1.layer{n}.{x}" for n in (0, 2) for x in "kq"]
        assert file.get_tensor("step1.layer2.q").shape == (2, 2, 192, 128) and file.metadata()["grid"] == "3x8x8"
    assert "q, k of 2 calls, 192 tokens" in said
    with pytest.raises(ValueError, match="layer 5 is not in 0..4"):
        quality_runs.trace(quality_runs.SMALL_CASES[0], 3, "cpu", [5], [1], path)
    with pytest.raises(SystemExit):
        script("quality").parse(["trace", "--layers", "0"])


def test_the_plan_starts_with_what_is_compared():
    settings = [*curves(), *budgets(2304)]
    pairs = plan(list(CASES), settings)
    everywhere = [s for s in settings if s.everywhere]
    assert [s for _, s in pairs[:len(everywhere)]] == everywhere
    assert {s.curve for s in everywhere} == {"Sol-Attn", "LiteAttention, tiles of 64", "LiteAttention, tiles of 128"}
    assert len(pairs) == len(settings) + 2 * len(everywhere) == len({(c, s) for c, s in pairs})
    assert [s.level for s in budgets(2304)][:3] == pytest.approx([-9.814, -8.492, -7.492], abs=1e-3)
    keys = [(c.name, s.curve, s.level) for c, s in pairs]
    assert len(keys) == len(set(keys))


def test_few_steps_have_a_plan_of_their_own(script):
    quality = script("quality")
    cases, steps, pairs = quality.chosen(quality.parse(["--steps", "4", "--prompts", "2"]))
    assert steps == 4 and len(cases) == 2
    assert {(s.warmup, s.restart) for _, s in pairs if s.kind == "kernel"} == {(1, 0), (2, 0), (1, 2)}


def test_the_page_shows_the_committed_results():
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    results = sorted((ROOT / "benchmarks" / "results").glob("*-quality*.json"))
    assert len(results) >= 2
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["finished"] and not result["left_out"] and not result["problems"]
        for name, table in sections(result["rows"]).items():
            assert table in page, f"{name} of {path.name}: python benchmarks/quality.py page --out prints it anew"


def test_liteattention_is_above_sol_attn_at_every_share_in_the_committed_result():
    path, = (ROOT / "benchmarks" / "results").glob("*-quality.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = frontier(rows)
    assert [row["share"] for row in found] == list(range(20, 80, 5)) and min(row["lead_db"] for row in found) > 3
    # The README tells what the node can do: tiles of 128, and no more than its largest budget skips.
    most = 100 * min(row["skipped"] for row in rows if row["method"] == "budget 1")
    leads = [row["LiteAttention, tiles of 128"] - row["Sol-Attn"] for row in found if row["share"] < most]
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"at 20 to 45 % skipped, {min(leads):.1f} to {max(leads):.1f} dB higher" in page and len(leads) == 6
