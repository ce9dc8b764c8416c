"""One attention call: this pack's kernel in all its forms against the attention that is there without it.

    python benchmarks/attention.py [--budget 270] [--json results/NAME.json]

Needs torch alone (Triton on a GPU); neither ComfyUI nor the network. All contenders of a group take turns on the same
tensors; every output is checked against float32 before it is timed, and one that fails has no time. The JSON file is
complete after each group. On a CPU the same command runs small sizes on the torch backend in under a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402

SPARSITIES = (0.0, 0.77, 0.57, 0.42, 0.21)
GPU_SHAPES = ((32768, 24), (75600, 40), (16384, 24), (8192, 32))
CPU_SHAPES = ((1024, 2), (2000, 2))
"""(tokens, heads), most important first; 2000 is no multiple of 128."""

COLUMNS = {"contender": "contender", "skipped": "skipped", "median_ms": "ms", "q1_ms": "q1", "q3_ms": "q3",
           "tflops": "TFLOP/s", "speedup_over_sdpa": "x SDPA", "efficiency": "efficiency",
           "over_reading": "/read", "error": "rel. L2", "problem": "problem"}


class DeviceLostError(RuntimeError):
    """A contender broke the GPU context: nothing more can run in this process."""

    def __init__(self, rows: list[dict], contender: str):
        super().__init__(f"after {contender}")
        self.rows = rows
        self.contender = contender


@dataclass(frozen=True)
class Group:
    """What is timed together. dtype: "bfloat16", "float16" or "float32"."""

    head_dim: int
    dtype: str
    tokens: int
    heads: int
    sparsity: float

    def __str__(self) -> str:
        return (f"{self.tokens} tokens, {self.heads} heads, D = {self.head_dim}, {self.dtype}, "
                f"{100 * self.sparsity:g} % of the tiles skipped")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 32768 75600 16384 8192; on a CPU 1024 2000")
    parser.add_argument("--heads", type=int, help="default: by tokens, 24 to 40; on a CPU 2")
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(64, 96, 128), help="default: 128 64; on a CPU 128")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES), help="shares of skipped tiles")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16; CPU float32")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD",
                        help="leave out contenders with this word in their name: flex, sage, int8, flash, …")
    parser.add_argument("--budget", type=float, default=270.0, help="seconds; what does not fit is left out")
    parser.add_argument("--json", type=Path, help="results; a plot goes beside them as PNG")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json and measure what is not there")
    return parser.parse_args(arguments)


def plan(args: argparse.Namespace, cuda: bool) -> list[Group]:
    """All groups, the most important first: D = 128 before the rest, long sequences before short ones."""
    shapes = GPU_SHAPES if cuda else CPU_SHAPES
    known = dict(shapes)
    wanted = [(n, args.heads or known.get(n, shapes[0][1])) for n in args.tokens or known]
    dims = args.head_dim or ([128, 64] if cuda else [128])
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    return [Group(d, dtype, n, h, s) for d in dims for n, h in wanted for s in args.sparsity]


def make_problem(group: Group, device, seed: int):
    """Random q, k, v whose key tiles differ in strength, and a realistic mask."""
    import torch
    from support.contenders import Problem
    from support.masks import TILE, realistic_bits

    from liteattention.kernels import Workspace

    torch.manual_seed(seed)
    shape = (1, group.tokens, group.heads, group.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, group.dtype)) for _ in range(3))
    tiles = -(-group.tokens // TILE)
    strength = (0.75 + 0.5 * torch.rand(tiles, device=device)).repeat_interleave(TILE)[:group.tokens]
    k *= strength[None, :, None, None].to(k.dtype)
    bits = realistic_bits(group.heads, group.tokens, group.sparsity, seed=seed, device=device)
    return Problem(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bits, Workspace())


def slower_sdpa(rows: list[dict], group: Group) -> set[str]:
    """SDPA backends that another one beat at 0 % on this shape: they need not be timed at each sparsity again."""
    shape = {**asdict(group), "sparsity": 0.0}
    times = {row["contender"]: row["median_ms"] for row in rows
             if row["contender"].startswith("sdpa") and row.get("median_ms") and shape.items() <= row.items()}
    return set(times) - {min(times, key=times.get)} if times else set()


def takes_part(contender, group: Group, without: list[str], slower: set[str]) -> bool:
    """At 0 % all; elsewhere what depends on the mask, the best SDPA and "unskipped", which is t(0) of efficiency."""
    if any(word in contender.name for word in without) or contender.name in slower:
        return False
    if group.sparsity == 0:
        return contender.form != "read"  # "unskipped" is the reader with every tile
    return contender.sparse or contender.form == "unskipped" or contender.name.startswith("sdpa")


def checked(contender, problem, references: dict):
    """The call to time and its `Check`; raises what the contender raises."""
    import torch
    from support.reference import Reference, poison

    restricted = contender.form in ("read", "record", "default", "masked")
    if restricted not in references:
        references[restricted] = Reference(problem.q, problem.k, problem.v, problem.bits if restricted else None)
    poison(problem.q)
    call = contender.build(problem)
    out = (contender.build_check(problem) if contender.build_check else call)()
    result = references[restricted].check(out, contender.tolerance(problem.q.dtype))
    del out
    if problem.q.is_cuda:
        torch.cuda.synchronize()
    return call, result


def usable(device) -> bool:
    """Whether the device still answers: after an illegal access in a kernel, every later call raises."""
    import torch

    try:
        return torch.zeros(1, device=device).add(1).item() == 1
    except RuntimeError:
        return False


def measure(group: Group, members: list, device, seconds: float, deadline: float, seed: int,
            mark: Callable[[str], None] = lambda text: None) -> list[dict]:
    """The rows of one group. `mark` is told what runs, in case it never ends."""
    from support.report import plain
    from support.timing import interleaved

    problem = make_problem(group, device, seed)
    skipped = 1 - problem.bits.float().mean().item()
    calls, rows, references = {}, {}, {}
    for contender in members:
        row = rows[contender.name] = {
            **asdict(group), "contender": contender.name, "form": contender.form, "precision": contender.precision,
            "skipped": skipped if contender.sparse else 0.0, "tolerance": contender.tolerance(problem.q.dtype)}
        mark(f"{group}: {contender.name}")
        try:
            call, result = checked(contender, problem, references)
            row |= {"error": result.error, "worst_row_error": result.worst_row}
            if result.passed:
                calls[contender.name] = call
            else:
                row["problem"] = f"wrong output: relative L2 {result.error:.2g}, worst row {result.worst_row:.2g}"
        except Exception as error:  # one contender's fault must not end the run
            row["problem"] = plain(error)
            if not usable(device):
                row["lost"] = True
                raise DeviceLostError([row], contender.name) from error
    mark(f"{group}: timing")
    times, failed = interleaved(calls, device, seconds=seconds, deadline=deadline) if calls else ({}, {})
    flops = 4.0 * group.tokens ** 2 * group.heads * group.head_dim
    for name, row in rows.items():
        if name in failed:
            row["problem"] = plain(failed[name])
        records = row["form"] in ("record", "default") and name in problem.masks
        if records and not problem.masks[name].to_bool().equal(problem.bits):
            row["problem"] = "tiles were dropped while it was timed"
        elif name in times:
            row |= asdict(times[name])
            row["tflops"] = flops * (1 - row["skipped"]) / times[name].median_ms / 1e9
    add_ratios(list(rows.values()))
    return list(rows.values())


def add_ratios(rows: list[dict]) -> None:
    """Put the ratios of one group into its rows: over the best SDPA, over reading, efficiency. A row without a time
    takes no part."""
    timed = {row["contender"]: row for row in rows if row.get("median_ms")}
    sdpa = [row["median_ms"] for name, row in timed.items() if name.startswith("sdpa")]
    for row in timed.values():
        took, form = row["median_ms"], row["form"]
        row["speedup_over_sdpa"] = min(sdpa) / took if sdpa else None
        unskipped = timed.get(f"unskipped {row['precision']}")
        read = timed.get(f"read {row['precision']}") or (unskipped if row["sparsity"] == 0 else None)
        if form in ("record", "default") and read:
            row["over_reading"] = took / read["median_ms"]
        if form in ("read", "record", "default") and unskipped and row["sparsity"]:
            row["efficiency"] = unskipped["median_ms"] * (1 - row["skipped"]) / took


def kernel_shares(group: Group, device, seed: int) -> list[dict]:
    """GPU time of each kernel of one call of this pack as a share of all of them, by torch's profiler."""
    import torch
    from support.contenders import contenders
    from support.report import plain

    problem = make_problem(group, device, seed)
    rows = []
    for contender in contenders(device, group.head_dim, problem.q.dtype)[0]:
        if contender.form not in ("read", "record", "default"):
            continue
        row = {"contender": contender.name, "tokens": group.tokens, "heads": group.heads, "sparsity": group.sparsity}
        try:
            call = contender.build(problem)
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(5):
                    call()
                torch.cuda.synchronize()
            events = profile.key_averages()
            took = {event.key: event.self_device_time_total for event in events if event.self_device_time_total > 0}
            whole = sum(took.values()) or 1.0
            row["call_us"] = whole / 5
            row["kernels"] = {plain(name, 60): took[name] / whole for name in sorted(took, key=took.get, reverse=True)}
            row["beside_attention"] = 1 - sum(t for name, t in took.items() if "attention" in name) / whole
        except Exception as error:  # the profiler needs rights that some machines do not give
            row["problem"] = plain(error)
        rows.append(row)
    return rows


def run(args: argparse.Namespace, report, device) -> None:
    """Measure group after group while the budget lasts."""
    import torch
    from support.contenders import contenders
    from support.report import table, without_folders

    cuda = device.type == "cuda"
    groups = plan(args, cuda)
    started, took, left_out = time.monotonic(), {}, []
    deadline = started + args.budget
    for number, group in enumerate(groups):
        present, absent = contenders(device, group.head_dim, getattr(torch, group.dtype))
        if number == 0:
            report.set(absent={name: without_folders(reason) for name, reason in absent.items()})
            print(*(f"absent: {name}: {reason}" for name, reason in absent.items()), sep="\n")
        if any(asdict(group).items() <= row.items() and "lost" not in row for row in report.rows):
            continue  # resumed
        slower = slower_sdpa(report.rows, group)
        members = [c for c in present if takes_part(c, group, args.without, slower)]
        key = (group.tokens, group.heads, group.head_dim)
        begun = time.monotonic()
        if begun + took.get(key, 0.0) > deadline:
            left_out.append(str(group))
            continue
        seconds = min(4.0, 0.5 * args.budget / len(groups)) if cuda else 1.5
        report.add(*(rows := measure(group, members, device, seconds, deadline, number,
                                    lambda text: report.set(running=text))))
        took[key] = time.monotonic() - begun
        print(f"\n{group}   [{time.monotonic() - started:.0f} s]\n{table(rows, COLUMNS)}", flush=True)
        if cuda:
            torch.cuda.empty_cache()
    report.set(left_out=left_out)
    if left_out:
        print("\nNot measured, the budget was spent:", *left_out, sep="\n  ")
    if cuda:
        near = sorted((g for g in groups if g.head_dim == groups[0].head_dim), key=lambda g: abs(g.sparsity - 0.57))
        for tokens in sorted({g.tokens for g in near}):
            if time.monotonic() < deadline:
                group = next(g for g in near if g.tokens == tokens)
                report.set(small=report.content.get("small", []) + kernel_shares(group, device, seed=0))


def again_without(args: argparse.Namespace, lost: DeviceLostError, budget: float) -> int:
    """Go on in a fresh process, without the contender that broke this one; its exit status."""
    print(f"The GPU context is lost after {lost.contender!r}; a new process goes on without it.", flush=True)
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    return subprocess.call([sys.executable, str(Path(__file__).resolve()), *arguments, "--resume", "--budget",
                            f"{budget:.0f}", "--without", *args.without, lost.contender])


def summarise(report) -> None:
    """Print what lies beside the attention kernel, and close the result."""
    from support.report import table

    if report.content.get("small"):
        print("\nShare of the GPU time that is not the attention kernel:")
        print(table(report.content["small"], {"contender": "contender", "tokens": "tokens", "sparsity": "sparsity",
                                              "call_us": "us", "beside_attention": "share", "problem": "problem"}))
    report.finish()


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if importlib.util.find_spec("torch") is None:
        rerun_with_requirements(None)
    load_pack()
    import torch
    from support.report import Report, environment, plot_speedups

    started = time.monotonic()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    head = environment("attention.py", device)
    report = Report(args.json, head, resume=args.resume)
    print(" | ".join(f"{key} {value}" for key, value in head.items() if value is not None), flush=True)
    try:
        with torch.inference_mode():
            run(args, report, device)
    except DeviceLostError as lost:
        report.add(*lost.rows)
        return again_without(args, lost, args.budget - (time.monotonic() - started))
    summarise(report)
    if args.json:
        print(plot_speedups(report.rows, args.json.with_suffix(".png"), head["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
