"""The torch backend on this machine's CPU against dense SDPA: does time fall as tiles are skipped?

    python benchmarks/cpu.py [--tokens 1024 2304 8192] [--json FILE]

Every figure is a median of interleaved runs of this one process; quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402

SPARSITIES = (0.0, 0.21, 0.42, 0.57, 0.77)


def seconds(functions: dict, rounds: int) -> dict[str, float]:
    """Median time of each function, in turn A B C … A B C …, after one warm-up each."""
    times = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(tokens: int, heads: int, head_dim: int, rounds: int) -> list[dict]:
    """Rows of one sequence length: dense SDPA and the backend at each sparsity, reading and recording."""
    import torch

    from liteattention.kernels import SkipMask, lite_attention, tiles

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, head_dim, generator=generator).transpose(1, 2) for _ in range(3))
    functions = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)}
    n = tiles(tokens)
    shares = {}
    for sparsity in SPARSITIES:
        bits = torch.rand(1, heads, n, n, generator=generator) >= sparsity
        bits |= torch.eye(n, dtype=torch.bool)
        mask = SkipMask.from_bool(bits, tokens, tokens)
        shares[sparsity] = 1 - mask.density()
        # -30 drops nothing here: every recording call finds the same tiles.
        functions[f"read {sparsity}"] = lambda m=mask: lite_attention(q, k, v, m, threshold=-30.0, record=False,
                                                                      backend="torch")
        functions[f"record {sparsity}"] = lambda m=mask: lite_attention(q, k, v, m, threshold=-30.0, backend="torch")
    took = seconds(functions, rounds)
    return [{"tokens": tokens, "skipped": round(shares[s], 3), "sdpa_ms": took["sdpa"] * 1e3,
             "read_ms": took[f"read {s}"] * 1e3, "record_ms": took[f"record {s}"] * 1e3,
             "speedup_over_sdpa": took["sdpa"] / took[f"record {s}"],
             "speedup_over_own_dense": took[f"record {SPARSITIES[0]}"] / took[f"record {s}"]} for s in SPARSITIES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2304, 8192])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rerun_with_requirements(None)
    load_pack()
    import torch

    rows = [row for tokens in args.tokens for row in measure(tokens, args.heads, args.head_dim, args.rounds)]
    print(" ".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value:>22.3f}" if isinstance(value, float) else f"{value:>22}" for value in row.values()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({
            "command": "python benchmarks/cpu.py --tokens " + " ".join(map(str, args.tokens)),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine(), "heads": args.heads,
            "head_dim": args.head_dim, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
