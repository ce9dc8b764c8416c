"""The demo: python demo/run.py [--help]

Samples the tiny demo model twice on the same seed, dense and with LiteAttention, and compares. With a ComfyUI at hand
(COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI) it starts that headless and queues demo/workflow_api.json
over its HTTP API; without one it runs the embedded pipeline in this folder. Both use the same settings, sampling run
and kernels. Dense means dense_blocks "0--1".
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
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


def run_comfyui(args: argparse.Namespace, comfy_path: Path) -> tuple[Result, Result]:
    """Dense and sparse through a real ComfyUI server."""
    import torch
    from safetensors.torch import load_file

    from liteattention.demo.pixels import from_comfy_latent
    from liteattention.tools.server import ComfyServer

    workflow = json.loads((ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    inputs = {k: v for k, v in workflow["3"]["inputs"].items() if not k.startswith("rule")}
    workflow["3"]["inputs"] = {**inputs, **rule_inputs(args), "warmup_steps": args.warmup_steps,
                               "pool_skipped": args.pool_skipped}
    workflow["5"]["inputs"] |= {"width": args.size * 8, "height": args.size * 8, "length": (args.frames - 1) * 4 + 1}
    workflow["6"]["inputs"] |= {"steps": args.steps, "seed": args.seed}
    results = []
    with ComfyServer(comfy_path, arguments=() if torch.cuda.is_available() else ("--cpu",)) as server:
        for blocks in (EVERY_BLOCK, ""):
            workflow["3"]["inputs"]["dense_blocks"] = blocks
            outputs = server.run(workflow, timeout_s=1800)
            saved = load_file(server.output_file(outputs["7"]["latents"][0]))["latent_tensor"]
            results.append(Result(server.summaries()[-1], from_comfy_latent(saved.float())))
    return results[0], results[1]


def run_embedded(args: argparse.Namespace) -> tuple[Result, Result]:
    """Dense and sparse through the embedded pipeline: the same sampling run, without ComfyUI."""
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

    def sample(blocks: str) -> Result:
        run = SamplingRun(LiteAttentionConfig(rule, warmup_steps=args.warmup_steps, pool_skipped=args.pool_skipped,
                                              dense_blocks=blocks, min_tokens=512), args.steps)
        try:
            latent = euler_flow(model, noise, flow_sigmas(args.steps, 3.0).to(device), positive, negative, 2.0,
                                on_evaluation=sparse_attention(model, run),
                                callback=lambda step, *_: run.end_step(step))
        finally:
            summary = run.close()
        return Result(summary.to_dict(), latent.float().cpu())

    return sample(EVERY_BLOCK), sample("")


def report(args: argparse.Namespace, engine: str, dense: Result, lite: Result) -> None:
    """The table, the picture and, where asked for, the JSON."""
    import torch

    from liteattention.benchmarks.demo_pipeline.clips import psnr, side_by_side
    from liteattention.demo.pixels import decode
    from liteattention.report.temporal import motion

    clips = [decode(result.latent) for result in (dense, lite)]
    quality, moved = psnr(*clips), motion(*clips)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "demo.webp"
    s = lite.summary
    side_by_side(clips, ["dense", f"LiteAttention {s['rule']}"], picture)
    numbers = {
        "engine": engine, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__, "python": platform.python_version(), "command": command(args),
        "settings": s["settings"], "steps": args.steps, "tokens": s["tokens"], "backend": s["backend"],
        "skipped": s["skipped"], "skipped_per_step": s["skipped_per_step"], "psnr_db": quality, **moved,
        "mask_bytes": s["mask_bytes"], "sparse_calls": s["sparse_calls"], "dense_calls": s["dense_calls"],
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    shares = [f"{share:.0%}" if share is not None else "-" for share in s["skipped_per_step"]]
    rows = [
        ("engine", engine), ("steps, tokens", f"{args.steps}, {s['tokens']}"), ("backend", s["backend"]),
        ("this run", s["plan"]), ("rule", s["rule"]), ("skipped per step", " ".join(shares)),
        ("skipped, whole run", f"{s['skipped']:.1%}"), ("PSNR against dense", f"{quality:.1f} dB"),
        ("motion against dense", "equal" if moved["motion_psnr_db"] is None else f"{moved['motion_psnr_db']:.1f} dB"),
        ("skip masks", f"{s['mask_bytes']} bytes"), ("side by side", str(picture)),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))


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
        dense, lite = run_comfyui(args, comfy_path)
    else:
        engine = "embedded pipeline"
        if args.engine == "auto":
            print("No ComfyUI found: running the embedded pipeline. To see it in ComfyUI, clone that to ~/ComfyUI "
                  "(git clone https://github.com/comfyanonymous/ComfyUI) or set COMFYUI_PATH, and run this again.")
        dense, lite = run_embedded(args)
    report(args, engine, dense, lite)


if __name__ == "__main__":
    main()
