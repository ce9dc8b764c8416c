"""The commands themselves, small, on a CPU."""

import json
import subprocess
import sys

import pytest
import torch


def started(script, name, *arguments):
    done = subprocess.run([sys.executable, script(name).__file__, *map(str, arguments)], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_attention(script, tmp_path):
    path = tmp_path / "r.json"
    said = started(script, "attention", "--device", "cpu", "--tokens", 300, "--sparsity", 0, 0.57, "--json", path)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["finished"] and len(result["rows"]) == 4 + 5 and not result["left_out"]
    assert not [r for r in result["rows"] if "problem" in r]
    assert all(r["q1_ms"] <= r["median_ms"] <= r["q3_ms"] and r["rounds"] >= 5 for r in result["rows"])
    assert all(r["error"] < 1e-4 for r in result["rows"])
    assert [r["contender"] for r in result["rows"] if "efficiency" in r] == ["read full", "record full", "default full"]
    assert "57 % of the tiles skipped" in said and "absent: sage" in said


def test_attention_keeps_to_its_budget_and_says_what_it_left_out(script, tmp_path):
    path = tmp_path / "r.json"
    started(script, "attention", "--device", "cpu", "--tokens", 256, "--sparsity", 0, 0.42, "--budget", 0,
            "--json", path)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["rows"] == [] and len(result["left_out"]) == 2


def test_cpu(script, tmp_path):
    path = tmp_path / "r.json"
    said = started(script, "cpu", "--tokens", 500, "--rounds", 2, "--without-flex", "--json", path)
    result, = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert all(len(x["quiet"]) == len(x["busy"]) == 2 for x in result["ms"].values())
    assert result["skipped"]["0"] == 0 and 0.5 < result["skipped"]["75 scattered"] < 1
    assert "FlexAttention: left out" in said and all(row["figure"] in said for row in result["figures"])
    assert all(x is None or x > 0 for row in result["figures"] for x in list(row.values())[2:])


def test_ratios_of_the_cpu_benchmark(script):
    skipped = {"0": 0.0, "57 scattered": 0.5, "75 scattered": 0.75, "75 band": 0.75}
    names = ["sdpa", "pooled 57 scattered", "default 57 scattered", *(f"{k} {x}" for k in ("read", "record")
                                                                      for x in skipped)]
    quiet = {name: [10.0, 20.0, 40.0] for name in names} | {"record 75 band": [5.0, 5.0, 7.0]}
    busy = {name: [2 * x for x in times] for name, times in quiet.items()} | {"sdpa": [10.0, 20.0, 40.0]}
    found = {row["figure"]: row for row in script("cpu").figures(quiet, busy, skipped)}
    assert found["efficiency, 75 band % (75.0%)"]["quiet"] == 1.0, "20 ms x 0.25 / 5 ms"
    assert found["efficiency, 75 band % (75.0%)"]["quiet, least"] == 0.5
    assert found["nothing skipped / SDPA, recording"]["busy"] == 2.0
    slowdown = found["slowdown beside a busy core / SDPA's, record 0"]
    assert slowdown["busy"] == slowdown["busy, least"] == 2.0 and slowdown["quiet"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this takes minutes")
def test_gpu_runs_the_stages_and_summarises(script, tmp_path):
    out = tmp_path / "out"
    said = started(script, "gpu", "--out", out, "--budget", 30, "--stages", "tests", "attention")
    names = sorted(p.name[10:] if p.name.startswith("20") else p.name for p in out.iterdir())
    assert names == ["-cpu-attention.json", "attention.log", "summary.txt"]
    assert "tests are left to tests/run.py" in said
    assert "default full" in (out / "summary.txt").read_text(encoding="utf-8")


def test_gpu_ends_what_does_not_end(script, tmp_path):
    gpu = script("gpu")
    outcome = gpu.run_stage("attention", [sys.executable, "-c", "print('begun'); import time; time.sleep(99)"],
                            tmp_path / "log", 3.0, environment={}, echo=False)
    assert outcome.status == gpu.TIMED_OUT and outcome.seconds < 60
    assert (tmp_path / "log").read_text(encoding="utf-8") == "begun\n" and "time limit" in str(outcome)


def test_the_summary_names_failed_tests_and_what_hung(script, tmp_path):
    gpu = script("gpu")
    results = {stage: tmp_path / f"{stage}.json" for stage in ("attention", "launch")}
    results["attention"].write_text(json.dumps({"device": "NVIDIA H200", "finished": False, "rows": [],
                                                "running": "32768 tokens: read int8"}), encoding="utf-8")
    (tmp_path / "tests.log").write_text("".join(f"FAILED test_{i}\n" for i in range(10)), encoding="utf-8")
    (tmp_path / "launch.log").write_text("31 us per call\n", encoding="utf-8")
    text = gpu.summary([gpu.Outcome("attention", gpu.TIMED_OUT, 200.0, "")], results, tmp_path)
    assert "ended while it ran: 32768 tokens: read int8" in text and "31 us per call" in text
    assert "FAILED test_7" in text and "FAILED test_8" not in text and "… and 2 more" in text
    assert len(text.splitlines()) < 50


def test_a_lost_gpu_is_left_without_its_contender(script, monkeypatch, tmp_path):
    attention = script("attention")
    path, commands = tmp_path / "r.json", []

    def lose(*_):
        raise attention.DeviceLostError([{"contender": "read int8", "problem": "illegal access", "lost": True}],
                                        "read int8")

    monkeypatch.setattr(attention, "run", lose)
    monkeypatch.setattr(attention.subprocess, "call", lambda command: commands.append(command) or 0)
    monkeypatch.setattr(attention.sys, "argv", ["attention.py", "--json", str(path), "--without", "flex"])
    assert attention.main() == 0
    (command,) = commands
    assert command[-3:] == ["--without", "flex", "read int8"]
    assert "--resume" in command and json.loads(path.read_text(encoding="utf-8"))["rows"][0]["lost"]
    again = attention.parse(command[2:])
    assert again.without == ["flex", "read int8"] and again.resume and again.json == path


def test_the_plan_puts_what_matters_first(script):
    attention = script("attention")
    groups = attention.plan(attention.parse([]), cuda=True)
    assert len(groups) == 2 * 4 * 5 and groups[0] == attention.Group(128, "bfloat16", 32768, 24, 0.0)
    assert {g.head_dim for g in groups[:20]} == {128} and {g.heads for g in groups if g.tokens == 75600} == {40}
    rows = [{**attention.asdict(groups[0]), "contender": c, "median_ms": t} for c, t in (("sdpa a", 1), ("sdpa b", 2))]
    assert attention.slower_sdpa(rows, groups[3]) == {"sdpa b"} and attention.slower_sdpa(rows, groups[5]) == set()
