"""LiteAttention with a step cache on top: what is computed and what it costs, in a real ComfyUI.

    python benchmarks/caches.py [--json FILE]

Samples the tiny demo model (demo/CARD.md, 20 steps, cfg 2) dense, with core's EasyCache at several thresholds, with
LiteAttention, and with both, each on the same seeds. Attention is the share of the dense run's tiles that is computed;
PSNR is that of the clip against the dense run. Nothing is timed: on a CPU the seconds would say little.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from comfyui import comfyui_version, find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402

CASES = ({"shape": "disc", "count": 2, "speed": "medium", "seed": 3},
         {"shape": "square", "count": 3, "speed": "fast", "seed": 7})
REUSE = (None, 0.02, 0.05, 0.1)
"""EasyCache's reuse_threshold; None for no EasyCache. Its default is 0.2."""
BUDGETS = (None, 0.3)
"""error_budget; None for dense attention."""


def prompt(case: dict, reuse: float | None, budget: float | None) -> dict:
    """The demo's workflow with or without EasyCache, before LiteAttention, and LiteAttention."""
    graph = json.loads((ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    graph["4"]["inputs"] |= {name: case[name] for name in ("shape", "count", "speed")}
    graph["6"]["inputs"]["seed"] = case["seed"]
    graph["3"]["inputs"] |= {"dense_blocks": "0--1"} if budget is None else {"rule.error_budget": budget}
    if reuse is not None:
        graph["10"] = {"class_type": "EasyCache", "inputs": {
            "model": ["2", 0], "reuse_threshold": reuse, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}}
        graph["3"]["inputs"]["model"] = ["10", 0]
    return graph


def measure(comfy_path: Path) -> list[dict]:
    """A row for every case and combination."""
    from safetensors.torch import load_file

    from liteattention.benchmarks.demo_pipeline.clips import psnr
    from liteattention.demo.pixels import decode, from_comfy_latent
    from liteattention.tools.server import ComfyServer

    rows = []
    with ComfyServer(comfy_path, arguments=("--cpu",)) as server:
        for number, case in enumerate(CASES):
            dense = None
            for budget in BUDGETS:
                for reuse in REUSE:
                    outputs = server.run(prompt(case, reuse, budget), timeout_s=1800)
                    latent = load_file(server.output_file(outputs["7"]["latents"][0]))["latent_tensor"]
                    clip, summary = decode(from_comfy_latent(latent.float())), server.summaries()[-1]
                    dense = dense or (clip, summary["tiles_total"])
                    rows.append({"case": number, "reuse_threshold": reuse, "error_budget": budget,
                                 "evaluations": summary["forward_passes"],
                                 "attention": summary["tiles_computed"] / dense[1],
                                 "psnr_db": None if clip is dense[0] else psnr(clip, dense[0])})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means over the cases, in Markdown."""
    lines = ["| EasyCache | LiteAttention | evaluations | attention computed | PSNR |",
             "| --- | --- | --- | --- | --- |"]
    for reuse in REUSE:
        for budget in BUDGETS:
            own = [row for row in rows if (row["reuse_threshold"], row["error_budget"]) == (reuse, budget)]
            evaluations, attention = (sum(row[name] for row in own) / len(own) for name in ("evaluations", "attention"))
            quality = "-" if own[0]["psnr_db"] is None else f"{sum(row['psnr_db'] for row in own) / len(own):.1f} dB"
            lines.append(f"| {'-' if reuse is None else reuse} | {'-' if budget is None else f'error_budget {budget}'} "
                         f"| {evaluations:g} of 20 | {attention * 100:.0f} % | {quality} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    comfy_path = find_comfyui()
    if comfy_path is None:
        sys.exit("No ComfyUI found (COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI).")
    rerun_with_requirements(comfy_path)
    load_pack()
    import torch

    rows = measure(comfy_path)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({
            "command": "python benchmarks/caches.py", "comfyui": comfyui_version(comfy_path),
            "torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "cases": CASES,
            "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
