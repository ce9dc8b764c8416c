"""How much of its attention a video can do without: PSNR over skipped share, for this pack's methods and others.

    python benchmarks/quality.py [--quick] [--only METHOD ...] [--prompts N] [--steps 20] [--out DIR]
    python benchmarks/quality.py trace --layers 0,2 --steps 2,10 --out FILE.safetensors
    python benchmarks/quality.py page --out FILE.json      the tables of docs/quality.md from a result

Runs the demo model with its embedded sampler, no ComfyUI needed: each case (prompt, seed, size) once with exact
attention and then under every setting; `docs/quality.md` says what they are. With at most 8 --steps, the settings are
those of distilled models. The default takes an hour on two cores and never longer than --budget: what does not fit is
named. A finished or killed run goes on with --resume.
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
    parser.add_argument("--quick", action="store_true", help="one small clip, 3 steps, one point a method: seconds")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods whose name begins so")
    parser.add_argument("--prompts", type=int, help="the first so many cases")
    parser.add_argument("--steps", type=numbers, help="denoising steps, 20; with trace: the steps to record")
    parser.add_argument("--sampling-steps", type=int, default=20, help="with trace: denoising steps")
    parser.add_argument("--layers", type=numbers, default=[0], help="with trace: the layers to record")
    parser.add_argument("--measure-every", type=int, default=1,
                        help="steps between measurements of error and dropped mass, which cost a dense call each")
    parser.add_argument("--budget", type=float, default=5400.0, help="seconds; runs that do not fit are left out")
    parser.add_argument("--jobs", type=int, help="processes; default: 1 with a GPU, else one a core, at most 4")
    parser.add_argument("--out", type=Path, help="a folder for JSON and plot; with trace and page: the file")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the result")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    args = parser.parse_args(arguments)
    if args.what == "trace" and (args.out is None or args.steps is None):
        parser.error("trace needs --steps and --out")
    if args.what == "page" and args.out is None:
        parser.error("page needs --out")
    if args.what == "run" and args.steps is not None and len(args.steps) != 1:
        parser.error("--steps takes one number")
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


def chosen(args: argparse.Namespace) -> tuple[list, int, list[tuple]]:
    """Cases, denoising steps, and the (case, setting) pairs to run."""
    from support.quality_plan import FEW, budgets, curves, few_steps, plan, quick
    from support.quality_runs import CASES, SMALL_CASES

    cases = list(SMALL_CASES if args.quick else CASES)[:args.prompts]
    steps = args.steps[0] if args.steps else 3 if args.quick else 20
    tokens = cases[0].size[0] * cases[0].size[1] * cases[0].size[2] // 4
    settings = quick() if args.quick else few_steps(steps) if steps <= FEW else [*curves(), *budgets(tokens)]
    pairs = plan(cases, settings)
    if args.only:
        pairs = [(c, s) for c, s in pairs if any(s.curve.lower().startswith(o.lower()) for o in args.only)]
    return cases, steps, pairs


def without_sol(pairs: list[tuple]) -> tuple[list[tuple], str]:
    """The pairs that can run here, and a line about Sol-Attn."""
    from support.sol import sol_attention

    found, said = sol_attention()
    if found is not None or not any(s.kind == "sol" for _, s in pairs):
        return pairs, f"comfy-kitchen {said}" if found is not None else said
    return [(c, s) for c, s in pairs if s.kind != "sol"], f"Sol-Attn is left out: {said}"


def run(args: argparse.Namespace, report, device: str, jobs: int) -> None:
    """All pairs, dense references first; a row is written as soon as it is there."""
    from support.report import plain, table

    cases, steps, pairs = chosen(args)
    pairs, said = without_sol(pairs)
    done = {(r["case"], r["method"], r["level"], r["steps"]) for r in report.rows}
    pairs = [(c, s) for c, s in pairs if (c.name, s.curve, s.level, steps) not in done]
    report.set(steps=steps, cases=[c.name for c in cases], sol=said, measure_every=args.measure_every)
    print(f"{said}\n{len(pairs)} runs of {steps} steps, {jobs} at a time", flush=True)
    deadline, left_out, problems = time.monotonic() + args.budget, [], []
    columns = {"case": "case", "method": "method", "level": "level", "skipped": "skipped", "psnr_db": "PSNR dB",
               "ssim": "SSIM", "error_mean": "rel. L2", "dropped_mean": "dropped", "seconds": "seconds"}
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker) as pool:
        references = {c.name: pool.submit(job, "dense_latent", c, steps, device) for c in cases
                      if any(c is x for x, _ in pairs)}
        waiting, running = list(pairs), {}
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                case, setting = waiting.pop(0)
                latent = references[case.name].result()
                running[pool.submit(job, "run_setting", case, setting, steps, device, latent,
                                    args.measure_every)] = case, setting
            if not running:
                left_out = [f"{c.name}: {s.curve} {s.level:g}" for c, s in waiting]
                break
            future = next(as_completed(running))
            case, setting = running.pop(future)
            try:
                row = future.result()
            except Exception as error:  # the other settings go on
                problems.append(f"{case.name}: {setting.curve} {setting.level:g}: {plain(error)}")
                print(problems[-1], flush=True)
                continue
            report.add(row)
            print(table([row], columns).split("\n")[1], flush=True)
    report.set(left_out=left_out, problems=problems)


def summarise(report, title: str) -> None:
    """Tables, verdict and plot."""
    from support.quality_report import POINTS, frontier, frontier_columns, plot, points, verdict
    from support.report import table

    found = frontier(report.rows)
    print(f"\nMean over cases. Shares are the whole run's; dropped: exact softmax mass of a row's skipped tiles\n"
          f"{table(points(report.rows), POINTS)}\n")
    print(f"PSNR in dB at a skipped share, interpolated case by case, mean over cases\n"
          f"{table(found, frontier_columns(report.rows))}\n\n{verdict(found)}")
    if report.content.get("left_out"):
        print(f"{len(report.content['left_out'])} runs did not fit into the budget: --resume goes on with them")
    report.finish(points=points(report.rows), frontier=found, verdict=verdict(found))
    if report.path:
        print(plot(report.rows, report.path.with_suffix(".png"), title))


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
    from support.quality_runs import CASES, trace
    from support.report import Report, environment

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.what == "trace":
        print(trace(CASES[0], args.sampling_steps, device.type, args.layers, args.steps, args.out))
        return
    _, steps, _ = chosen(args)
    name = f"{datetime.date.today().isoformat()}-quality"
    name += "-quick" if args.quick else "" if steps == 20 else f"-{steps}-steps"
    head = environment("quality.py", device)
    jobs = args.jobs or (1 if device.type == "cuda" else min(os.cpu_count() or 1, 4))
    report = Report(args.out / f"{name}.json" if args.out else None, {**head, "jobs": jobs, "threads": 1},
                    resume=args.resume)
    print(" | ".join(f"{key} {value}" for key, value in head.items() if value is not None), flush=True)
    run(args, report, device.type, jobs)
    summarise(report, f"{steps} steps, demo model")


if __name__ == "__main__":
    main()
