"""Everything that a session with a GPU should run, in one command:

    python benchmarks/gpu.py --out DIR [--budget 540]

In turn, each in a process of its own with its share of the time: the kernel tests on the GPU, `attention.py`,
`launch.py`. What a stage does not use goes to the next ones. DIR gets one log per stage, the results as JSON and PNG
under the names that `benchmarks/results/` uses, and `summary.txt`.
Needs torch, Triton, numpy, pytest and hypothesis, nothing else. On a machine without a GPU the tests are left to
`tests/run.py` and the rest runs small.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

SHARES = {"tests": 0.40, "attention": 0.53, "launch": 0.07}
GRACE = 12.0
"""Seconds between the budget that a benchmark is told, and its end by force."""
TIMED_OUT = 124
SHOWN = 24
"""Rows of `attention.py` in the summary, the most important first."""


@dataclass(frozen=True)
class Outcome:
    """Of one stage. `status`: exit status; 124 where it was ended by force."""

    stage: str
    status: int
    seconds: float
    last_line: str

    def __str__(self) -> str:
        word = {0: "ok", TIMED_OUT: "ended at its time limit"}.get(self.status, f"exit status {self.status}")
        return f"{self.stage:<10} {self.seconds:5.0f} s  {word}" + (f"  {self.last_line}" if self.last_line else "")


def end_group(process: subprocess.Popen) -> None:
    """End a child and its children; they form a process group of their own."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass


def run_stage(stage: str, command: list[str], log: Path, limit: float, *, environment: dict[str, str],
              echo: bool) -> Outcome:
    """Run a child, its output into `log` and, with `echo`, onto the screen; ended after `limit` seconds."""
    started, timed_out, last = time.monotonic(), threading.Event(), ""
    process = subprocess.Popen(command, cwd=ROOT / "tests", env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               preexec_fn=os.setpgrp if os.name == "posix" else None)
    timer = threading.Timer(limit, lambda: (timed_out.set(), end_group(process)))
    timer.start()
    try:
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = line.strip() or last
                if echo:
                    print(line, end="", flush=True)
        status = process.wait()
    finally:
        timer.cancel()
        end_group(process)
    status = TIMED_OUT if timed_out.is_set() else status
    return Outcome(stage, status, time.monotonic() - started, last if stage == "tests" else "")


def test_command() -> list[str]:
    """The kernel tests; several at a time where pytest-xdist is there, because most of their time is compiling."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini"), "-v", "--tb=short",
               "--durations=8", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100",
               str(ROOT / "tests" / "kernels")]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))]
    return command


def load(path: Path) -> dict:
    """A result, or {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def commands(stage: str, results: dict[str, Path], limit: float) -> list[str]:
    """The command line of a stage that has `limit` seconds."""
    if stage == "tests":
        return test_command()
    command = [sys.executable, str(ROOT / "benchmarks" / f"{stage}.py")]
    budget = ["--budget", f"{max(5.0, limit - GRACE):.0f}"] if stage == "attention" else []
    return [*command, *budget, "--json", str(results[stage])]


def from_logs(out: Path) -> list[str]:
    """What is worth a place in the summary of the logs: failed tests, Python's cost per call."""
    def read(stage: str) -> list[str]:
        log = out / f"{stage}.log"
        return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []

    failed = [line[:150] for line in read("tests") if line.startswith(("FAILED ", "ERROR "))]
    more = [f"… and {len(failed) - 8} more"] if len(failed) > 8 else []
    return ["", *failed[:8], *more] * bool(failed) + ["", *(line[:150] for line in read("launch")[-8:])]


def summary(outcomes: list[Outcome], results: dict[str, Path], out: Path) -> str:
    """One screen: the stages, the times of the default call, what went wrong."""
    from support.report import table

    attention = load(results["attention"])
    lines = [" | ".join(f"{key} {attention[key]}" for key in ("device", "driver", "torch", "triton", "numpy", "python")
                        if attention.get(key)), "", *map(str, outcomes)]
    rows = attention.get("rows", [])
    columns = {"tokens": "tokens", "head_dim": "D", "contender": "contender", "skipped": "skipped", "median_ms": "ms",
               "speedup_over_sdpa": "x SDPA", "efficiency": "efficiency", "over_reading": "/read"}
    shown = [row for row in rows if row["form"] == "default" and row.get("median_ms")]
    if shown:
        lines += ["", table(shown[:SHOWN], columns)]
    problems = list(dict.fromkeys(f"{r['contender']}: {r['problem']}" for r in rows if r.get("problem")))
    if problems:
        lines += ["", f"Problems ({len(problems)}):", *(f"  {p[:150]}" for p in problems[:8])]
    absent = attention.get("absent", {})
    if absent:
        lines += ["", "Absent: " + ", ".join(absent) + " (reasons in the attention log)"]
    if attention.get("running") and not attention.get("finished"):
        lines += ["", f"attention.py ended while it ran: {attention['running']}"]
    if attention.get("left_out"):
        lines += [f"Not measured for want of time: {len(attention['left_out'])} groups"]
    return "\n".join(lines + from_logs(out)).rstrip()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--stages", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import torch
    from support.report import result_name

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    results = {stage: out / result_name(device, stage) for stage in ("attention", "launch")}
    stages = [s for s in SHARES if s in args.stages]
    if not cuda and "tests" in stages:
        print("No GPU: the kernel tests are left to tests/run.py.")
        stages.remove("tests")
    deadline = time.monotonic() + args.budget
    outcomes: list[Outcome] = []
    for number, stage in enumerate(stages):
        left = deadline - time.monotonic()
        limit = max(5.0, left * SHARES[stage] / sum(SHARES[s] for s in stages[number:]))
        print(f"\n== {stage}, at most {limit:.0f} s", flush=True)
        # The machine's own packages are enough: nothing is to be set up there.
        environment = {"TRITON_INTERPRET": "0", "LITEATTENTION_ENVIRONMENT_READY": "1"}
        outcomes.append(run_stage(stage, commands(stage, results, limit), out / f"{stage}.log", limit,
                                  environment=environment, echo=stage != "tests"))
        print(outcomes[-1], flush=True)
    text = summary(outcomes, results, out)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n== summary\n{text}")
    return int(any(o.status for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
