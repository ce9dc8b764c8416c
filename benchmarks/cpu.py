"""The torch backend on this machine's CPU against torch's fused attention (SDPA) and FlexAttention, as ratios.

    python benchmarks/cpu.py [--tokens 2304 8192] [--rounds 8] [--json FILE]

All calls of one length take turns A B C … A B C …, on a quiet machine and beside a process that keeps one core busy, in
alternating blocks (this script starts and stops it). Medians, and the fastest call of each ("least"). Quote the ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from environment import rerun_with_requirements  # noqa: E402
from load_pack import load_pack  # noqa: E402

HEADS, HEAD_DIM = 2, 128
BLOCKS = 2
"""How often a quiet and a busy block alternate."""
NEVER_DROPS = -30.0
"""log2. Drops nothing in these data, so that every recording call finds the same tiles."""

Times = dict[str, list[float]]


def masks(tokens: int):
    """bool [1, H, QT, QT] by name: nothing, 57 % scattered, 75 % scattered, 75 % in a band around the diagonal."""
    import torch

    n = -(-tokens // 128)
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.eye(n, dtype=torch.bool)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()

    def scattered(share: float):
        return (torch.rand(1, HEADS, n, n, generator=generator) >= share * n / max(1, n - 1)) | diagonal

    band = min((distance <= width for width in range(n)), key=lambda bits: abs(bits.float().mean().item() - 0.25))
    full = torch.ones(1, HEADS, n, n, dtype=torch.bool)
    return {"0": full, "57 scattered": scattered(0.57), "75 scattered": scattered(0.75),
            "75 band": band.expand(1, HEADS, n, n).contiguous()}


def calls(tokens: int, flex: bool) -> tuple[dict[str, Callable[[], object]], dict[str, float], str]:
    """Calls by name, the share of tiles that each mask skips, and why FlexAttention is not among them ("" if it is)."""
    import torch

    from liteattention.kernels import SkipMask, Workspace, lite_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3))
    bits, workspace = masks(tokens), Workspace()

    def lite(name: str, **options) -> Callable[[], object]:
        mask = SkipMask.from_bool(bits[name], tokens, tokens)
        return lambda: lite_attention(q, k, v, mask, threshold=NEVER_DROPS, backend="torch", workspace=workspace,
                                      **options)

    functions = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)}
    for name in bits:
        functions[f"read {name}"] = lite(name, record=False)
        functions[f"record {name}"] = lite(name)
    functions["pooled 57 scattered"] = lite("57 scattered", pool_skipped=True)
    functions["default 57 scattered"] = lite("57 scattered", pool_skipped=True, criterion="mass")
    reason = "" if flex else "left out"
    if flex:
        try:
            functions |= flex_calls(q, k, v, bits)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return functions, {name: 1 - x.float().mean().item() for name, x in bits.items()}, reason


def flex_calls(q, k, v, bits) -> dict[str, Callable[[], object]]:
    """FlexAttention under the same masks, after a check of its result. Raises where it cannot be compiled."""
    import torch
    from support.contenders import compiled_flex, flex_block_mask

    from liteattention.kernels import SkipMask, lite_attention

    flex, found, tokens = compiled_flex(), {}, q.shape[2]
    for name, x in bits.items():
        mask = flex_block_mask(x, tokens)
        found[f"flex {name}"] = lambda mask=mask: flex(q, k, v, block_mask=mask)
        expected = lite_attention(q, k, v, SkipMask.from_bool(x, tokens, tokens), record=False, backend="torch")
        torch.testing.assert_close(found[f"flex {name}"](), expected, atol=1e-4, rtol=1e-3)
    return found


@contextmanager
def one_core_busy() -> Iterator[None]:
    """A process that does nothing but compute, for as long as the block lasts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def take_turns(functions: dict[str, Callable[[], object]], rounds: int, times: Times) -> None:
    """Add `rounds` times in ms of each function, in turn."""
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times.setdefault(name, []).append((time.perf_counter() - started) * 1e3)


def figures(quiet: Times, busy: Times, skipped: dict[str, float]) -> list[dict]:
    """The ratios: of medians and of least times, quiet and busy."""
    kinds = {"quiet": (quiet, statistics.median), "quiet, least": (quiet, min),
             "busy": (busy, statistics.median), "busy, least": (busy, min)}
    found = {kind: {name: reduce(x) for name, x in times.items()} for kind, (times, reduce) in kinds.items()}

    def ratio(figure: str, name: str, other: str, must: str = "", factor: float = 1.0) -> dict:
        return {"figure": figure, "must": must,
                **{kind: round(factor * x[name] / x[other], 3) for kind, x in found.items()}}

    def slowdown(name: str) -> dict:
        values = {kind: found[kind][name] / found[quiet_kind][name] / (found[kind]["sdpa"] / found[quiet_kind]["sdpa"])
                  for kind, quiet_kind in (("busy", "quiet"), ("busy, least", "quiet, least"))}
        return {"figure": f"slowdown beside a busy core / SDPA's, {name}", "must": "at most 1.2",
                **{kind: round(values[kind], 3) if kind in values else None for kind in kinds}}

    some = [name for name in skipped if name != "0"]
    return [
        ratio("nothing skipped / SDPA, reading", "read 0", "sdpa", "at most 1.4"),
        ratio("nothing skipped / SDPA, recording", "record 0", "sdpa", "at most 1.4"),
        *(ratio(f"recording / reading, {x} %", f"record {x}", f"read {x}", "at most 1.1") for x in skipped),
        *(ratio(f"efficiency, {x} % ({skipped[x]:.1%})", "record 0", f"record {x}",
                "at least 0.85" if x.startswith("75") else "", 1 - skipped[x]) for x in some),
        ratio("pooled / without, 57 %", "pooled 57 scattered", "record 57 scattered", "at most 1.05"),
        ratio("the node's defaults / SDPA, 57 %", "default 57 scattered", "sdpa"),
        *(ratio(f"recording / FlexAttention, {x} %", f"record {x}", f"flex {x}") for x in skipped
          if f"flex {x}" in quiet),
        slowdown("record 0"), slowdown("record 75 band"), slowdown("default 57 scattered"),
    ]


def measure(tokens: int, rounds: int, flex: bool) -> dict:
    """Times and figures of one length."""
    functions, skipped, reason = calls(tokens, flex)
    quiet, busy = {}, {}
    take_turns(functions, 2, {})
    for block in range(BLOCKS):
        share = rounds * (block + 1) // BLOCKS - rounds * block // BLOCKS
        take_turns(functions, share, quiet)
        with one_core_busy():
            take_turns(functions, share, busy)
    return {"tokens": tokens, "skipped": {name: round(x, 4) for name, x in skipped.items()},
            "flex": reason or "compiled", "figures": figures(quiet, busy, skipped),
            "ms": {name: {"quiet": [round(x, 2) for x in quiet[name]], "busy": [round(x, 2) for x in busy[name]]}
                   for name in functions}}


def show(result: dict) -> None:
    """Print a table of one length."""
    sdpa, lite = (statistics.median(result["ms"][name]["quiet"]) for name in ("sdpa", "record 0"))
    print(f"\n{result['tokens']} tokens: SDPA {sdpa:.0f} ms, recording with nothing skipped {lite:.0f} ms")
    if result["flex"] != "compiled":
        print(f"FlexAttention: {result['flex']}")
    columns = [key for key in result["figures"][0] if key not in ("figure", "must")]
    print(f"{'':64}" + "".join(f"{column:>14}" for column in columns) + "   must")
    for row in result["figures"]:
        values = "".join(f"{'' if row[c] is None else row[c]:>14}" for c in columns)
        print(f"{row['figure']:64}{values}   {row['must']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2304, 8192])
    parser.add_argument("--rounds", type=int, default=8, help="calls of each kind, quiet and again busy; at least 2")
    parser.add_argument("--without-flex", action="store_true", help="do not compile FlexAttention, half a minute")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.rounds < BLOCKS:
        parser.error(f"--rounds is {args.rounds}; at least {BLOCKS}, one for each block")
    rerun_with_requirements(None)
    load_pack()
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        print(f"Load of this machine: {load:.1f}. The figures called quiet are not.")
    results = []
    for tokens in args.tokens:
        results.append(measure(tokens, args.rounds, not args.without_flex))
        show(results[-1])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({
            "command": f"python benchmarks/cpu.py --tokens {' '.join(map(str, args.tokens))} --rounds {args.rounds}",
            "date": datetime.date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version(),
            "threads": torch.get_num_threads(), "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(), "load_before": load, "heads": HEADS,
            "head_dim": HEAD_DIM, "dtype": "float32", "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
