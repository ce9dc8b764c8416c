"""The attention of a whole denoising run: dense SDPA against LiteAttention as it records and skips, step by step.

    python benchmarks/trajectory.py [--budget 150] [--json results/NAME.json]

Wan-14B at 480p and 720p, 81 frames (32760 and 75600 tokens, 40 heads of 128), 20 steps, two simulated layers (the
model has 40; each has its own q, k, v, and none sees another's output). q, k, v are synthetic and drift from step to
step, see `support/drift.py`: the times are real, how much is skipped and the error are those of the synthetic data. At
each step every variant gets the same q, k, v. On a CPU the same command runs a small video.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402

GRIDS = {"480p": (21, 30, 52), "720p": (21, 45, 80), "small": (13, 15, 26), "tiny": (13, 8, 16)}
"""Latent frames, rows, columns of Wan at 81 frames (832 x 480, 1280 x 720), of the CPU's run, and of the tests."""

WRONG = {"full": 0.03, "int8": 0.1}
"""Relative L2 against dense at the step that records first, where nothing is skipped yet: beyond it a kernel is wrong,
and the variant has no further times."""

COLUMNS = {"variant": "variant", "step": "step", "dense_ms": "dense ms", "lite_ms": "lite ms", "skipped": "skipped",
           "speedup": "speed-up", "error": "rel. L2", "problem": "problem"}
TOTALS = {"shape": "shape", "variant": "variant", "steps": "steps", "dense_s": "dense s", "lite_s": "lite s",
          "speedup": "speed-up", "last_speedup": "at the end", "skipped": "skipped", "error": "rel. L2",
          "mask_mb": "mask MB", "workspace_mb": "scratch MB", "extra_mb": "call MB",
          "dense_extra_mb": "dense call MB"}


@dataclass
class Variant:
    """LiteAttention with one threshold and precision. Its masks, one per layer, and its scratch live over the run."""

    threshold: float
    precision: str
    masks: list = field(default_factory=list)
    workspace: object = None
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.threshold:g} {self.precision}"


@dataclass
class Run:
    """What one shape's run is made of."""

    name: str
    layers: list
    variants: list[Variant]
    dense: object
    warmup: int
    device: object

    def tokens(self) -> int:
        return self.layers[0].grid.tokens


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(GRIDS), help="default: 480p 720p; on a CPU small")
    parser.add_argument("--steps", type=int, help="default: 20; on a CPU 6")
    parser.add_argument("--layers", type=int, default=2, help="simulated layers (the model has 40)")
    parser.add_argument("--heads", type=int, help="default: 40; on a CPU 2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threshold", type=float, nargs="+", default=[-10.0], help="log2, below 0")
    parser.add_argument("--precision", nargs="+", choices=("full", "int8"), default=["full", "int8"])
    parser.add_argument("--warmup", type=int, default=2, help="first steps that compute everything; the last records")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16; CPU float32")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds; a run that does not fit is cut short")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    return parser.parse_args(arguments)


def best_dense(q, k, v) -> tuple[str, object]:
    """The fastest SDPA backend for these shapes, by three calls each: its name and the function of q, k, v."""
    import torch
    from support.timing import interleaved
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = torch.nn.functional.scaled_dot_product_attention

    def using(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return attention(q, k, v)
        return call

    choices = {"sdpa": attention}
    if q.is_cuda:
        choices |= {"sdpa cudnn": using(SDPBackend.CUDNN_ATTENTION), "sdpa flash": using(SDPBackend.FLASH_ATTENTION)}
    times, _ = interleaved({name: lambda f=f: f(q, k, v) for name, f in choices.items()}, q.device, seconds=0.1,
                           min_rounds=3, max_rounds=3)
    name = min(times, key=lambda n: times[n].median_ms)
    return name, choices[name]


def relative_error(out, expected) -> float:
    """Relative L2 over everything, a head at a time: float32 copies of all heads would take gigabytes."""
    square = sum((out[:, h].float() - expected[:, h].float()).square().sum() for h in range(out.shape[1]))
    norm = sum(expected[:, h].float().square().sum() for h in range(out.shape[1]))
    return (square / norm).sqrt().item()


def prepare(name: str, args: argparse.Namespace, device) -> tuple[Run, str]:
    """The layers and variants of one shape, every kernel compiled; and the name of the dense backend."""
    import torch
    from support.drift import DriftingLayer, Grid
    from support.report import plain

    from liteattention.kernels import SkipMask, Workspace, lite_attention, precision_choice

    cuda = device.type == "cuda"
    heads, steps = args.heads or (40 if cuda else 2), args.steps or (20 if cuda else 6)
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    grid = Grid(*GRIDS[name])
    layers = [DriftingLayer(grid, heads, args.head_dim, steps, dtype=dtype, device=device, seed=layer)
              for layer in range(args.layers)]
    q = torch.randn(1, grid.tokens, heads, args.head_dim, dtype=dtype, device=device).transpose(1, 2)
    dense_name, dense = best_dense(q, q, q)
    variants = []
    for threshold in args.threshold:
        for precision in args.precision:
            variant = Variant(threshold, precision, workspace=Workspace())
            variants.append(variant)
            backend = "triton" if cuda else "torch"
            variant.problem = precision_choice(device, args.head_dim, dtype, grid.tokens, precision, backend).reason
            variant.masks = [SkipMask.full(1, heads, grid.tokens, device=device) for _ in layers]
            if not variant.problem:
                try:
                    lite_attention(q, q, q, SkipMask.full(1, heads, grid.tokens, device=device), threshold=threshold,
                                   precision=precision, backend=backend, workspace=variant.workspace)
                except Exception as error:  # the others go on
                    variant.problem = plain(error)
    warmup = min(args.warmup, max(1, steps // 4))
    return Run(name, layers, variants, dense, warmup, device), dense_name


def timed(run: Run, function) -> tuple[object, float, float]:
    """Output, milliseconds, and MB of GPU memory beyond what was held before, the output included."""
    import torch
    from support.timing import Stopwatch

    watch = Stopwatch(run.device)
    if watch.cuda:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda._sleep(1_000_000)
    start = watch.mark()
    out = function()
    milliseconds = watch.milliseconds(start, watch.mark())
    return out, milliseconds, (torch.cuda.max_memory_allocated() - held) / 2**20 if watch.cuda else 0.0


def one_step(run: Run, step: int) -> list[dict]:
    """All variants through all layers at one step: one row each, milliseconds summed over the layers."""
    from support.report import plain

    from liteattention.kernels import lite_attention

    rows = {v.name: {"shape": run.name, "tokens": run.tokens(), "variant": v.name, "threshold": v.threshold,
                     "precision": v.precision, "step": step, "dense_ms": 0.0, "lite_ms": 0.0, "error": 0.0,
                     "extra_mb": 0.0, "dense_extra_mb": 0.0} for v in run.variants}
    for number, layer in enumerate(run.layers):
        q, k, v = layer.next()
        expected, dense_ms, dense_mb = timed(run, lambda q=q, k=k, v=v: run.dense(q, k, v))
        for variant in (x for x in run.variants if not x.problem):
            row, mask = rows[variant.name], variant.masks[number]
            row["dense_ms"] += dense_ms
            row["dense_extra_mb"] = max(row["dense_extra_mb"], dense_mb)
            if step < run.warmup - 1:  # the pack leaves these steps to the attention that was there before
                row["lite_ms"] += dense_ms
                continue
            try:
                out, milliseconds, extra = timed(run, lambda q=q, k=k, v=v, variant=variant, mask=mask: lite_attention(
                    q, k, v, mask, threshold=variant.threshold, precision=variant.precision,
                    backend="triton" if q.is_cuda else "torch", workspace=variant.workspace))
                error = relative_error(out, expected)
                row["error"] += error / len(run.layers)
                if step == run.warmup - 1 and not error <= WRONG[variant.precision]:
                    raise ArithmeticError(f"wrong output: relative L2 {error:.2g} with nothing skipped")
            except Exception as error:  # the other variants go on
                row["problem"] = variant.problem = plain(error)
                continue
            row["lite_ms"] += milliseconds
            row["extra_mb"] = max(row["extra_mb"], extra)
    for variant in run.variants:
        row = rows[variant.name]
        # Of the mask as this step leaves it: what the next step skips.
        row["skipped"] = statistics.mean(1 - m.density() for m in variant.masks)
        if row["lite_ms"] and "problem" not in row:
            row["speedup"] = row["dense_ms"] / row["lite_ms"]
    return [rows[v.name] for v in run.variants if not v.problem or "problem" in rows[v.name]]


def total(run: Run, variant: Variant, rows: list[dict]) -> dict:
    """What one variant's steps of one shape add up to."""
    rows = [r for r in rows if (r["shape"], r["variant"]) == (run.name, variant.name) and "problem" not in r]
    if variant.problem or not rows:
        return {"shape": run.name, "variant": variant.name, "steps": len(rows), "problem": variant.problem}
    dense, lite = (sum(r[key] for r in rows) / 1e3 for key in ("dense_ms", "lite_ms"))
    return {"shape": run.name, "tokens": run.tokens(), "variant": variant.name, "steps": len(rows), "dense_s": dense,
            "lite_s": lite, "speedup": dense / lite, "last_speedup": rows[-1]["speedup"],
            "skipped": rows[-1]["skipped"], "error": rows[-1]["error"],
            "mask_mb": sum(m.nbytes for m in variant.masks) / 2**20 / len(variant.masks),
            "workspace_mb": variant.workspace.nbytes / 2**20,
            "extra_mb": max(r["extra_mb"] for r in rows), "dense_extra_mb": max(r["dense_extra_mb"] for r in rows)}


def run_shape(name: str, args: argparse.Namespace, report, device, deadline: float) -> None:
    """One shape's whole run, or as many steps as the time allows."""
    from support.report import table

    run, dense_name = prepare(name, args, device)
    steps = run.layers[0].steps
    print(f"\n{name}: {run.tokens()} tokens, {run.layers[0].heads} heads, {len(run.layers)} simulated layers, "
          f"{steps} steps; dense is {dense_name}", flush=True)
    report.set(dense=report.content.get("dense", {}) | {name: dense_name})
    for step in range(steps):
        if time.monotonic() > deadline:
            print(f"{name} is cut short before step {step}: the budget is spent")
            break
        report.add(*(rows := one_step(run, step)))
        print(table(rows, COLUMNS) if step == 0 else table(rows, COLUMNS).partition("\n")[2], flush=True)
    report.set(totals=report.content.get("totals", []) + [total(run, v, report.rows) for v in run.variants])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if importlib.util.find_spec("torch") is None:
        rerun_with_requirements(None)
    load_pack()
    import torch
    from support.report import Report, environment, plain, table

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    head = environment("trajectory.py", device)
    report = Report(args.json, {**head, "data": "synthetic, benchmarks/support/drift.py", "layers": args.layers,
                                "model_layers": 40, "warmup": args.warmup})
    print(" | ".join(f"{key} {value}" for key, value in head.items() if value is not None), flush=True)
    deadline = time.monotonic() + args.budget
    with torch.inference_mode():
        for name in args.shapes or (["480p", "720p"] if device.type == "cuda" else ["small"]):
            if time.monotonic() > deadline:
                print(f"{name} is left out: the budget is spent")
                continue
            try:
                run_shape(name, args, report, device, deadline)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            except RuntimeError as error:  # out of memory at 720p must not cost the 480p totals
                report.set(problems=report.content.get("problems", []) + [f"{name}: {plain(error)}"])
                print(f"{name} ended early: {plain(error)}")
    report.finish()
    print(f"\nTotals. Synthetic data; dense is the fastest SDPA; the error is the last step's; mask MB are per layer\n"
          f"{table(report.content.get('totals', []), {**TOTALS, 'problem': 'problem'})}")


if __name__ == "__main__":
    main()
