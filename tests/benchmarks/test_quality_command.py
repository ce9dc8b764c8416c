"""The quality lab as a command, small, and the pages that quote its results."""

import json
import subprocess
import sys

import pytest
from safetensors import safe_open
from support.quality_cases import CASES, CHOOSING, ROOT, SMALL_CASES
from support.quality_plan import FEWER, LITE, PEER, plan
from support.quality_report import SHARES, cases_of, lead, sections
from support.quality_runs import trace

PER_RUN = {"case", "half", "model", "steps", "tokens", "method", "kind", "level", "skipped", "psnr_db",
           "psnr_db_worst_frame", "ssim", "motion_psnr_db", "quiet_motion", "psnr_db_long", "seconds"}


def started(script, *arguments):
    done = subprocess.run([sys.executable, script("quality").__file__, *map(str, arguments)], capture_output=True,
                          text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quick_from_end_to_end_and_resumed(script, tmp_path):
    arguments = ("--quick", "--device", "cpu", "--jobs", 1, "--out", tmp_path)
    only = (LITE, "fewer steps", PEER, "donor")
    started(script, *arguments, "--only", LITE, "--cases", "shapes")
    (path,) = tmp_path.glob("*.json")
    path = path.rename(tmp_path / "2026-01-01-quality-quick.json")  # begun on another day
    begun = json.loads(path.read_text(encoding="utf-8"))
    begun["rows"].append({**begun["rows"][0], "case": "of an older lab"})
    path.write_text(json.dumps(begun), encoding="utf-8")
    said = started(script, *arguments, "--resume", "--only", *only)
    assert list(tmp_path.glob("*.json")) == [path]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.endswith("-quality-quick.json") and result["finished"]
    assert result["problems"] == [] and result["left_out"] == [] and result["command"].startswith("python benchmarks/q")
    keys = [(r["case"], r["method"], r["level"]) for r in result["rows"]]
    sol = not result["sol"].startswith("comfy-kitchen 0")
    planned = [(c.name, s.method, s.level) for c, s in plan(list(SMALL_CASES)) if s.method.startswith(only)]
    assert sorted(keys) == sorted(key for key in planned if key[1] != PEER or not sol)
    assert sol == ("Sol-Attn is left out" in said)
    for r in result["rows"]:
        assert set(r) == PER_RUN and r["steps"] == 3 and 0 <= r["skipped"] <= 1
    saved = {r["level"]: r["skipped"] for r in result["rows"] if r["method"] == "fewer steps"
             and r["case"] == SMALL_CASES[0].name}
    assert saved == {2: pytest.approx(1 / 3)} and "quiet areas" in said


def test_without_time_it_names_what_it_left_out(script, tmp_path):
    said = started(script, "--quick", "--device", "cpu", "--jobs", 1, "--budget", -1, "--out", tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text(encoding="utf-8"))["left_out"]) >= 5 and "did not fit" in said


def test_trace(script, tmp_path):
    path = tmp_path / "t.safetensors"
    said = trace(SMALL_CASES[0], 3, "cpu", [0, 2], [1], path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == [f"step1.layer{n}.{x}" for n in (0, 2) for x in "kq"]
        assert file.get_tensor("step1.layer2.q").shape == (2, 2, 192, 128) and file.metadata()["grid"] == "3x8x8"
    assert "q, k of 2 calls, 192 tokens" in said
    with pytest.raises(ValueError, match="layer 5 is not in 0..4"):
        trace(SMALL_CASES[0], 3, "cpu", [5], [1], path)
    with pytest.raises(SystemExit):
        script("quality").parse(["trace", "--layers", "0"])


def test_the_plan_starts_with_what_is_compared_and_tries_on_the_choosing_half():
    pairs = plan(list(CASES))
    keys = [(c.name, s.method, s.level) for c, s in pairs]
    assert len(keys) == len(set(keys))
    methods = list(dict.fromkeys(s.method for _, s in pairs))
    assert methods[:3] == [LITE, "fewer steps", PEER]
    assert all(c.half == CHOOSING for c, s in pairs if s.kind == "simulation")


def committed():
    """The file that the pages quote, its content and its rows."""
    path = max((ROOT / "benchmarks" / "results").glob("*-quality.json"))
    result = json.loads(path.read_text(encoding="utf-8"))
    return path, result, result["rows"]


def words(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_the_page_shows_the_committed_result():
    path, result, rows = committed()
    assert result["finished"] and not result["problems"]
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for name, table in sections(rows).items():
        assert table in page, f"{name}: python benchmarks/quality.py page --out {path.name} prints it anew"
    assert path.name in page and f"{len(rows)} runs" in page
    assert (f"{len(result['left_out'])} runs did not fit" in " ".join(page.split())) == bool(result["left_out"])


def leads(rows, shares, over):
    found = [lead(rows, case, share / 100, LITE, over) for case in cases_of(rows) for share in shares]
    return [x for x in found if x is not None]


def test_the_readme_tells_the_range_over_all_cases():
    _, _, rows = committed()
    peer = [share for share in SHARES if share >= 20]
    found = leads(rows, peer, PEER)
    reached = {case for case in cases_of(rows) if leads([r for r in rows if r["case"] == case], peer, PEER)}
    assert (f"from {min(found):.1f} to {max(found):.1f} dB closer to the dense clip than Sol-Attn at 20 to 45 % "
            f"skipped, over {len(reached)} cases") in words("README.md")
    for level in (0.3, 0.6):
        own = [lead(rows, r["case"], r["skipped"], LITE, FEWER) for r in rows
               if (r["method"], r["level"]) == (LITE, level)]
        own = [x for x in own if x is not None]
        assert f"`error_budget` {level} from {min(own):+.1f} to {max(own):+.1f} dB" in words("README.md")


def test_every_result_is_quoted():
    pages = " ".join(words(str(p.relative_to(ROOT))) for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert path.name in pages, path.name
