"""How much of its attention a video can do without: this pack's rules, Sol-Attn and fewer steps on two small models.

    python benchmarks/quality.py [--quick] [--only METHOD ...] [--cases NAME] [--out DIR]
    python benchmarks/quality.py trace --layers 0,2 --steps 2,10 --out FILE.safetensors
    python benchmarks/quality.py page --out FILE.json      the tables of docs/quality.md from a result

Needs no ComfyUI. Each case of `support/quality_cases.py` is sampled with exact attention and then under every setting;
`docs/quality.md` says what they are. The default takes less than an hour on two quiet cores and never longer than
--budget: what does not fit is named. A finished or killed run goes on with --resume.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402


def numbers(text: str) -> list[int]:
    """"0,2" -> [0, 2]."""
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "trace", "page"), default="run")
    parser.add_argument("--quick", action="store_true", help="two small clips of 3 steps: a minute")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods whose name begins so")
    parser.add_argument("--cases", default="", help="those whose half (choosing, reporting) or name begins so")
    parser.add_argument("--steps", type=numbers, help="with trace: the steps to record")
    parser.add_argument("--layers", type=numbers, default=[0], help="with trace: the layers to record")
    parser.add_argument("--budget", type=float, default=7200.0, help="seconds; runs that do not fit are left out")
    parser.add_argument("--jobs", type=int, help="processes; default: 1 with a GPU, else one a core, at most 4")
    parser.add_argument("--out", type=Path, help="a folder for results, default out/quality; with trace and page: the "
                                                 "file")
    parser.add_argument("--resume", action="store_true", help="keep the rows of present cases that are in the result")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    args = parser.parse_args(arguments)
    if args.what == "trace" and (args.out is None or args.steps is None):
        parser.error("trace needs --steps and --out")
    if args.what == "page" and args.out is None:
        parser.error("page needs --out")
    args.out = args.out or ROOT / "out" / "quality"
    return args


def start_worker() -> None:
    """What a process needs before its first run."""
    load_pack()
    import torch

    torch.set_num_threads(1)


def job(kind: str, *arguments: object) -> object:
    """In a worker: a function of `support.quality_runs` by name."""
    from support import quality_runs

    return getattr(quality_runs, kind)(*arguments)


def chosen(args: argparse.Namespace) -> list[tuple]:
    """The (case, setting) pairs to run."""
    from support.quality_cases import CASES, SMALL_CASES
    from support.quality_plan import plan

    pairs = plan([case for case in (SMALL_CASES if args.quick else CASES)
                  if case.half.startswith(args.cases) or case.name.startswith(args.cases)])
    if args.only:
        pairs = [(c, s) for c, s in pairs if any(s.method.lower().startswith(o.lower()) for o in args.only)]
    return pairs


def without_sol(pairs: list[tuple]) -> tuple[list[tuple], str]:
    """The pairs that can run here, and a line about Sol-Attn."""
    from support.sol import sol_attention

    found, said = sol_attention()
    if found is not None or not any(s.kind == "sol" for _, s in pairs):
        return pairs, f"comfy-kitchen {said}" if found is not None else said
    return [(c, s) for c, s in pairs if s.kind != "sol"], f"Sol-Attn is left out: {said}"


def run(args: argparse.Namespace, report, device: str, jobs: int) -> None:
    """All pairs, a case's dense runs before its others; a row is written as soon as it is there."""
    from support.quality_cases import CASES, SMALL_CASES
    from support.quality_report import has_lost
    from support.quality_runs import references
    from support.report import plain, table

    pairs, said = without_sol(chosen(args))
    known = {case.name for case in (*CASES, *SMALL_CASES)}
    report.set(rows=[r for r in report.rows if r["case"] in known])
    done = {(r["case"], r["method"], r["level"]) for r in report.rows}
    pairs = [(c, s) for c, s in pairs if (c.name, s.method, s.level) not in done]
    report.set(sol=said)
    print(f"{said}\n{len(pairs)} runs, {jobs} at a time", flush=True)
    deadline, left_out, lost, problems = time.monotonic() + args.budget, [], [], []
    columns = {"case": "case", "method": "method", "level": "level", "skipped": "skipped", "psnr_db": "PSNR dB",
               "ssim": "SSIM", "quiet_motion": "quiet areas", "seconds": "seconds"}
    folder = args.out / "dense"
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker) as pool:
        waiting, running, dense = list(pairs), {}, set()
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                case, setting = waiting.pop(0)
                if has_lost(report.rows, setting.method):
                    lost.append(f"{case.name}: {setting.method} {setting.level:g}")
                    continue
                if case not in dense:
                    for future in [pool.submit(job, "reference", case, n, device, folder) for n in references(case)]:
                        future.result()
                    dense.add(case)
                running[pool.submit(job, "row_of", case, setting, device, folder)] = case, setting
            if not running:
                left_out = [f"{c.name}: {s.method} {s.level:g}" for c, s in waiting]
                break
            future = next(as_completed(running))
            case, setting = running.pop(future)
            try:
                row = future.result()
            except Exception as error:  # the other settings go on
                problems.append(f"{case.name}: {setting.method} {setting.level:g}: {plain(error)}")
                print(problems[-1], flush=True)
                continue
            report.add(row)
            print(table([row], columns).split("\n")[1], flush=True)
    report.set(left_out=left_out, lost=lost, problems=problems)


def summarise(report) -> None:
    """Tables and plot."""
    from support.quality_report import plot, sections

    for name, text in sections(report.rows).items():
        print(f"\n{name}: least / mean / largest (cases)\n{text}")
    if report.content.get("left_out"):
        print(f"{len(report.content['left_out'])} runs did not fit into the budget: --resume goes on with them")
    report.finish()
    print(plot(report.rows, report.path.with_suffix(".png")))


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.what == "page":
        from support.quality_report import sections

        rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
        print("\n\n".join(sections(rows).values()))
        return
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None:
        rerun_with_requirements(None)
    load_pack()
    import torch
    from support.quality_cases import CASES
    from support.quality_runs import trace
    from support.report import Report, environment

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.what == "trace":
        print(trace(CASES[0], CASES[0].steps, device.type, args.layers, args.steps, args.out))
        return
    kind = "quality-quick" if args.quick else "quality"
    path = args.out / f"{datetime.date.today().isoformat()}-{kind}.json"
    if args.resume:
        path = max(args.out.glob(f"*-{kind}.json"), default=path)
    head = environment("quality.py", device)
    jobs = args.jobs or (1 if device.type == "cuda" else min(os.cpu_count() or 1, 4))
    report = Report(path, {**head, "jobs": jobs, "threads": 1}, resume=args.resume)
    print(" | ".join(f"{key} {value}" for key, value in head.items() if value is not None), flush=True)
    run(args, report, device.type, jobs)
    summarise(report)


if __name__ == "__main__":
    main()
