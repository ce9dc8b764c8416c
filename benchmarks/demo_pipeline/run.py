"""The demo: python demo/run.py [--help]

Samples the tiny demo model on one seed: dense, with LiteAttention, and dense in as many steps as fit into
LiteAttention's time; compares times and clips. With a ComfyUI at hand (COMFYUI_PATH, the one this pack is installed in,
~/ComfyUI) it starts that headless and queues demo/workflow_api.json over its HTTP API; without one it runs the embedded
pipeline in this folder. Both use the same settings, sampling run and kernels. Dense means dense_blocks "0--1". On a CPU
ComfyUI starts with an attention of its own; there a second server has torch's fused attention for the dense calls, as
the embedded pipeline and ComfyUI on a GPU have.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import comfyui_version, find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402

EVERY_BLOCK = "0--1"


@dataclass
class Result:
    """One run: its summary (see `RunSummary.to_dict`) and the latent in model space, float32 [1, 16, T, h, w]."""

    summary: dict
    latent: object

    @property
    def seconds(self) -> float:
        """Of sampling, without loading the model and saving the clip."""
        return self.summary["seconds"]


Sample = Callable[[int, bool], Result]
"""(steps, sparse) -> a run of so many steps, with LiteAttention or dense."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("auto", "comfyui", "embedded"), default="auto")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--error-budget", type=float, default=0.3,
                      help="share of its attention that a token may lose; default %(default)s")
    rule.add_argument("--threshold", type=float, help="log2; the other rule, in place of the error budget")
    parser.add_argument("--pool-skipped", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=9, help="latent frames; default %(default)s")
    parser.add_argument("--size", type=int, default=32, help="latent height and width; default %(default)s")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the picture; default ./out")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


def command(args: argparse.Namespace) -> str:
    """The command that gives these numbers again, without where it wrote them."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "json")}
    options = {k: k.replace("_", "-") for k in settings}
    changed = [f"--{'' if v else 'no-'}{options[k]}" if isinstance(v, bool) else
               f"--{options[k]} {v:g}" if isinstance(v, float) else f"--{options[k]} {v}"
               for k, v in settings.items() if v != make_parser().get_default(k)]
    return " ".join(["python demo/run.py", *changed])


def rule_inputs(args: argparse.Namespace) -> dict:
    """The inputs of the node that choose its rule."""
    if args.threshold is not None:
        return {"rule": "threshold", "rule.threshold": args.threshold}
    return {"rule": "error budget", "rule.error_budget": args.error_budget}


@contextmanager
def in_comfyui(args: argparse.Namespace, comfy_path: Path, options: tuple[str, ...]) -> Iterator[Sample]:
    """Runs through a real ComfyUI server, started with these options."""
    from safetensors.torch import load_file

    from liteattention.demo.pixels import from_comfy_latent
    from liteattention.tools.server import ComfyServer

    workflow = json.loads((ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    inputs = {k: v for k, v in workflow["3"]["inputs"].items() if not k.startswith("rule")}
    workflow["3"]["inputs"] = {**inputs, **rule_inputs(args), "warmup_steps": args.warmup_steps,
                               "pool_skipped": args.pool_skipped}
    workflow["5"]["inputs"] |= {"width": args.size * 8, "height": args.size * 8, "length": (args.frames - 1) * 4 + 1}
    workflow["6"]["inputs"] |= {"seed": args.seed}
    with ComfyServer(comfy_path, arguments=options) as server:

        def sample(steps: int, sparse: bool) -> Result:
            workflow["3"]["inputs"]["dense_blocks"] = "" if sparse else EVERY_BLOCK
            workflow["6"]["inputs"]["steps"] = steps
            outputs = server.run(workflow, timeout_s=1800)
            saved = load_file(server.output_file(outputs["7"]["latents"][0]))["latent_tensor"]
            return Result(server.summaries()[-1], from_comfy_latent(saved.float()))

        yield sample


@contextmanager
def embedded(args: argparse.Namespace) -> Iterator[Sample]:
    """Runs through the embedded pipeline: the same sampling run, without ComfyUI."""
    import torch

    from liteattention.benchmarks.demo_pipeline.sampler import comfy_noise, euler_flow, flow_sigmas
    from liteattention.benchmarks.demo_pipeline.wan import load_tiny_wan, sparse_attention
    from liteattention.demo.pixels import empty_prompt, prompt_tokens
    from liteattention.runtime import ErrorBudget, LiteAttentionConfig, SamplingRun, Threshold

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_tiny_wan(ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors", device=device)
    positive, negative = (x.to(device) for x in (prompt_tokens(0, 2, 1), empty_prompt()))
    noise = comfy_noise((1, 16, args.frames, args.size, args.size), args.seed).to(device)
    rule = ErrorBudget(args.error_budget) if args.threshold is None else Threshold(args.threshold)

    def sample(steps: int, sparse: bool) -> Result:
        run = SamplingRun(LiteAttentionConfig(rule, warmup_steps=args.warmup_steps, pool_skipped=args.pool_skipped,
                                              dense_blocks="" if sparse else EVERY_BLOCK, min_tokens=512), steps)
        try:
            latent = euler_flow(model, noise, flow_sigmas(steps, 3.0).to(device), positive, negative, 2.0,
                                on_evaluation=sparse_attention(model, run),
                                callback=lambda step, *_: run.end_step(step))
        finally:
            summary = run.close()
        return Result(summary.to_dict(), latent.float().cpu())

    yield sample


@dataclass
class Runs:
    """What is compared. fewer_steps: dense in the time of `lite`, or None where that is not less than `dense` takes.
    fused: the same with torch's fused attention for dense calls, where `dense` and `lite` have another one."""

    dense: Result
    lite: Result
    fewer_steps: Result | None
    fused: Runs | None = None


def compare(sample: Sample, steps: int) -> Runs:
    """Dense, lite, and dense in as many steps as fit into lite's time."""
    sample(1, False)  # the first run of a process is slower
    dense, lite = sample(steps, False), sample(steps, True)
    fit = max(1, round(steps * lite.seconds / dense.seconds))
    return Runs(dense, lite, sample(fit, False) if fit < steps else None)


def compare_in_comfyui(args: argparse.Namespace, comfy_path: Path) -> Runs:
    """The same in ComfyUI; on a CPU also with torch's fused attention, in a server of its own."""
    import torch

    if torch.cuda.is_available():
        with in_comfyui(args, comfy_path, ()) as sample:
            return compare(sample, args.steps)
    with in_comfyui(args, comfy_path, ("--cpu",)) as sample:
        runs = compare(sample, args.steps)
    with in_comfyui(args, comfy_path, ("--cpu", "--use-pytorch-cross-attention")) as sample:
        runs.fused = compare(sample, args.steps)
    return runs


def report(args: argparse.Namespace, engine: str, runs: Runs) -> None:
    """The table, the picture and, where asked for, the JSON."""
    import torch

    from liteattention.benchmarks.demo_pipeline.clips import psnr, side_by_side
    from liteattention.demo.pixels import decode
    from liteattention.report.temporal import motion

    dense, lite = decode(runs.dense.latent), decode(runs.lite.latent)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "demo.webp"
    s = runs.lite.summary
    side_by_side([dense, lite], ["dense", f"LiteAttention {s['rule']}"], picture)
    instead = runs.fewer_steps and {"steps": runs.fewer_steps.summary["total_steps"],
                                    "seconds": runs.fewer_steps.seconds,
                                    "psnr_db": psnr(dense, decode(runs.fewer_steps.latent))}
    numbers = {
        "engine": engine, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__, "python": platform.python_version(), "command": command(args),
        "settings": s["settings"], "steps": args.steps, "tokens": s["tokens"], "backend": s["backend"],
        "skipped": s["skipped"], "skipped_per_step": s["skipped_per_step"], "psnr_db": psnr(dense, lite),
        **motion(dense, lite), "seconds": runs.lite.seconds, "dense_seconds": runs.dense.seconds,
        "dense_attention": s["fallback"], "attention_share": s["attention_share"], "fewer_steps": instead,
        "fused": runs.fused and {"seconds": runs.fused.lite.seconds, "dense_seconds": runs.fused.dense.seconds},
        "mask_bytes": s["mask_bytes"], "sparse_calls": s["sparse_calls"], "dense_calls": s["dense_calls"],
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    rows = table(numbers, s) + [("side by side", str(picture))]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def table(numbers: dict, summary: dict) -> list[tuple[str, str]]:
    """Rows of the report, the most important first."""
    fewer, fused, moved = numbers["fewer_steps"], numbers["fused"], numbers["motion_psnr_db"]

    def faster(times: dict) -> str:
        seconds, dense = times["seconds"], times["dense_seconds"]
        return f"{seconds:.1f} s, dense {dense:.1f} s: {dense / seconds:.2f}x as fast"

    rows = [("sampling", f"{faster(numbers)} ({numbers['dense_attention']})")]
    if fused:
        rows.append(("with torch's fused attention", faster(fused)))
    instead = "dense in as many steps" if fewer is None else (
        f"dense in {fewer['steps']} steps ({fewer['seconds']:.1f} s): {fewer['psnr_db']:.1f} dB")
    shares = [f"{share:.0%}" if share is not None else "-" for share in numbers["skipped_per_step"]]
    return [
        *rows, ("attention skipped", f"{numbers['skipped']:.1%}"),
        ("PSNR against dense", f"{numbers['psnr_db']:.1f} dB"),
        ("motion against dense", "equal" if moved is None else f"{moved:.1f} dB"), ("in the same time", instead),
        ("steps, tokens", f"{numbers['steps']}, {numbers['tokens']}"), ("this run", summary["plan"]),
        ("rule", summary["rule"]), ("skipped per step", " ".join(shares)),
        ("skip masks", f"{numbers['mask_bytes']} bytes"), ("backend", numbers["backend"]),
        ("engine", numbers["engine"]),
    ]


def main() -> None:
    args = make_parser().parse_args()
    try:
        comfy_path = None if args.engine == "embedded" else find_comfyui()
    except FileNotFoundError as error:
        sys.exit(str(error))
    if comfy_path is None and args.engine == "comfyui":
        sys.exit("No ComfyUI found. Clone it to ~/ComfyUI (git clone https://github.com/comfyanonymous/ComfyUI) or set "
                 "COMFYUI_PATH to where it is.")
    rerun_with_requirements(comfy_path)
    from load_pack import load_pack

    load_pack()
    if comfy_path is not None:
        engine = f"ComfyUI {comfyui_version(comfy_path)}"
        runs = compare_in_comfyui(args, comfy_path)
    else:
        engine = "embedded pipeline"
        if args.engine == "auto":
            print("No ComfyUI found: running the embedded pipeline. To see it in ComfyUI, clone that to ~/ComfyUI "
                  "(git clone https://github.com/comfyanonymous/ComfyUI) or set COMFYUI_PATH, and run this again.")
        with embedded(args) as sample:
            runs = compare(sample, args.steps)
    report(args, engine, runs)


if __name__ == "__main__":
    main()
