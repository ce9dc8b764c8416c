"""What a call costs before the GPU starts: the time of `lite_attention` in Python, per call.

    python benchmarks/launch.py [--json FILE]

On a GPU, the time until a call returns, for a call so small that the GPU never falls behind. Without one, Triton runs
with a driver that launches nothing (`tools/offline_gpu.py`): everything but the driver's own launch, which takes a few
microseconds more. Median of many calls; needs Triton.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402

ARCHITECTURES = ("sm_89", "sm_90")
TOKENS = 1024
AT_MOST_US = 100.0


def microseconds(call, rounds: int) -> float:
    """Median over rounds of 100 calls."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - started) / 100 * 1e6)
    return statistics.median(times)


def measure(arch: str, offline: bool, rounds: int) -> list[dict]:
    """One row per kind of call. q, k, v are packed [B, N, H*D] with B = 2, as ComfyUI hands them over."""
    import torch

    from liteattention.kernels import SkipMask, Workspace, lite_attention, precision, triton_launch

    device = "cpu" if offline else "cuda"
    if offline:
        from offline_gpu import OfflineGPU

        triton_launch.architecture = precision.architecture = lambda _: arch
        context = OfflineGPU(arch)
    else:
        context = nullcontext()
    q, k, v = (torch.randn(2, TOKENS, 2 * 128, device=device).bfloat16() for _ in range(3))
    masks = [SkipMask.full(1, 2, TOKENS, device=device) for _ in range(2)]
    computed = torch.zeros(32, dtype=torch.int64, device=device)
    rows = []
    with context:
        kinds = {"recording": {}, "recording int8": {"precision": "int8"}}
        if not offline:  # on a CPU, torch's part of pooling is arithmetic and not a launch
            kinds["error budget, pooled"] = {"criterion": "mass", "pool_skipped": True}
        for name, options in kinds.items():
            # One workspace per kind of call, as a run has one.
            options = {"threshold": -10.0, "heads": 2, "backend": "triton", "workspace": Workspace(),
                       "computed": computed, **options}
            took = microseconds(lambda o=options: lite_attention(q, k, v, masks, **o), rounds)
            rows.append({"arch": arch, "call": name, "us": round(took, 1)})
            if not offline:
                torch.cuda.synchronize()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rerun_with_requirements(None)
    load_pack()
    import torch

    try:
        import triton
    except ImportError:
        print("Triton is not installed here; without it there is nothing to launch.", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    offline = not torch.cuda.is_available()
    if offline:
        from liteattention.kernels import api

        api.choose_backend = lambda device, requested: "triton"  # its self-test would want the GPU
        rows = [row for arch in ARCHITECTURES for row in measure(arch, True, args.rounds)]
    else:
        from liteattention.kernels.launch_table import architecture

        rows = measure(architecture(torch.device("cuda")), False, args.rounds)
    for row in rows:
        print(f"{row['arch']:>7} {row['call']:<20} {row['us']:6.1f} us per call")
    full = [row["us"] for row in rows if row["call"] == "recording"]
    print(f"Full precision: {min(full):.0f} to {max(full):.0f} us (wanted: under {AT_MOST_US:.0f}); "
          f"{'driver left out' if offline else 'driver included'}.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({
            "date": datetime.date.today().isoformat(), "command": "python benchmarks/launch.py",
            "machine": platform.machine(), "driver": not offline, "torch": torch.__version__,
            "triton": triton.__version__, "python": platform.python_version(), "rows": rows}, indent=1) + "\n",
            encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
