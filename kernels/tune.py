"""Run as a script: time the launch configurations that this GPU could use and keep the faster ones for this user.

    python kernels/tune.py [--tokens 16384] [--heads 16] [--dry-run]

Optional: without it the built-in table is used. Writes launch.json into the user's cache (LITEATTENTION_CACHE names
another folder); deleting the file undoes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

GAIN = 0.03
"""A configuration has to be faster than the table's by this share: less is noise."""


def candidates(table, int8: bool) -> list:
    """The table's configuration and its neighbours in tile, warps, stages and recording form."""
    found = [table]
    for block_n in (32, 64, 128):
        for num_warps in (4, 8):
            for num_stages in (1, 2, 3):
                if block_n == 128 and int8 and table.pv_fp16:
                    continue
                found += [replace(table, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages, record=record)
                          for record in (1, 3)]
    return list(dict.fromkeys(found))


def choose(configs: Iterable, measure: Callable[[object], float]) -> tuple[object, dict]:
    """The first configuration, unless another is faster by more than GAIN; and every time, by configuration.

    Args:
        measure: seconds of one call; an exception means that the configuration cannot run here.
    """
    first, *rest = configs
    times = {first: measure(first)}
    for config in rest:
        try:
            times[config] = measure(config)
        except Exception as error:
            print(f"  left out: {config}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    best = min(times, key=times.get)
    return (best if times[best] < times[first] * (1 - GAIN) else first), times


def main() -> int:
    from selftest import load_kernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dry-run", action="store_true", help="measure and print, keep nothing")
    args = parser.parse_args()
    kernels = load_kernels()
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU here to tune for: torch.cuda.is_available() is False.", file=sys.stderr)
        return 1
    verdict = kernels.triton_probe.triton_verdict(torch.device("cuda"))
    if not verdict.usable:
        print(verdict.reason, file=sys.stderr)
        return 1
    launch = kernels.launch_table
    arch = launch.architecture(torch.device("cuda"))
    kept = {}
    for head_dim in (128, 64):
        for int8 in (False, True):
            if int8 and kernels.precision_choice(torch.device("cuda"), head_dim, torch.bfloat16, args.tokens,
                                                 "int8").name != "int8":
                continue
            for recording in (False, True):
                kind = launch.CallKind(arch, head_dim, torch.bfloat16, recording, int8)
                table = launch.table_config(kind)
                print(f"{kind.key}:", flush=True)
                best, times = choose(candidates(table, int8),
                                     lambda config, k=kind: seconds(kernels, config, k, args.tokens, args.heads))
                print(f"  table {times[table] * 1e3:.2f} ms, best {times[best] * 1e3:.2f} ms: {best}")
                if best != table:
                    kept[kind.key] = best
                    kept[replace(kind, dtype=torch.float16).key] = best
    if args.dry_run or not kept:
        print("Nothing kept." if args.dry_run else "The table is as fast as anything tried; nothing to keep.")
        return 0
    print(f"Kept in {launch.store_tuned(kept)}; the next start of ComfyUI uses it.")
    return 0


def seconds(kernels, config, kind, tokens: int, heads: int, rounds: int = 5) -> float:
    """Median time of one call with `config`, after checking its result against the table's configuration."""
    import statistics

    import torch
    from liteattention_selftest.triton_launch import triton_attention

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, kind.head_dim, generator=generator, device="cuda", dtype=kind.dtype)
               .transpose(1, 2) for _ in range(3))
    mask = kernels.SkipMask.full(1, heads, tokens, device="cuda")
    workspace = kernels.Workspace()

    def call(config) -> torch.Tensor:
        out = torch.empty_like(q)
        # Noise at -30: every recording call finds the same tiles.
        triton_attention(q, k, v, out, None, [(mask, 0)], [False], -30.0, kind.recording, None, kind.head_dim ** -0.5,
                         workspace, None, int8=kind.int8, config=config)
        return out

    error = (call(config) - call(kernels.launch_table.table_config(kind))).abs().max().item()
    if not error < 2e-2:
        raise ArithmeticError(f"its result differs by {error:.3g}")
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(config)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
