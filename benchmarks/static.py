"""Compile the shipped launch table for GPUs that are not here, and print or check what the machine code holds.

    python benchmarks/static.py [--archs sm_89 sm_90] [--json FILE]
    python benchmarks/static.py --check     compare with benchmarks/static_pins.json; exit status 1 if something is off
    python benchmarks/static.py --pin       write that file anew
    python benchmarks/static.py --every     also every other form that any settings launch, not pinned: an hour

Needs Triton (Linux) and no GPU; three minutes on two cores. Columns: compute tile, warps, stages and where decisions
are recorded; registers per thread; spilled bytes; shared memory; of the main loop its instructions, asynchronous copies
and tensor instructions; atomics of the whole kernel. Hard limits hold whatever is pinned: no spills in what the node's
defaults launch, shared memory of the architecture, no serialised wgmma, asynchronous copies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from load_pack import load_pack  # noqa: E402

load_pack()
from support import pins  # noqa: E402
from support.compiling import compile_all, serve  # noqa: E402
from support.report import table  # noqa: E402
from support.variants import AMD, NVIDIA, Variant, all_variants, gate_variants, variants  # noqa: E402

COLUMNS = {"variant": "variant", "launch": "tile", "registers": "regs", "spill": "spill", "kib": "KiB",
           "loop": "loop", "copies": "copies", "tensor": "tensor instructions", "atomics": "atomics",
           "problem": "problem"}


def gate(jobs: int = 2) -> list[str]:
    """What the tests ask: everything wrong with the gate's variants and with the list of pins."""
    held = pins.load()
    return pins.check(compile_all(__file__, gate_variants(), jobs), names(), held, triton_version())


def names() -> list[str]:
    """Of all variants that are pinned."""
    return [variant.name for arch in NVIDIA for variant in variants(arch)]


def triton_version() -> str:
    import triton

    return triton.__version__


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(NVIDIA), choices=(*NVIDIA, *AMD), metavar="ARCH",
                        help=f"default: {' '.join(NVIDIA)}; also {' '.join(AMD)}, which are not pinned")
    parser.add_argument("--every", action="store_true", help="every launchable form, pinned or not")
    parser.add_argument("--gate", action="store_true", help="only the variants that the tests compile")
    parser.add_argument("--json", type=Path, help="also write all figures here, with the loop's instructions by name")
    parser.add_argument("--pin", action="store_true", help="make what is compiled now the pinned figures")
    parser.add_argument("--check", action="store_true", help="compare with the pinned figures")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.pin and (args.gate or args.every or args.archs != list(NVIDIA)):
        parser.error("--pin writes the whole file: it goes with none of --gate, --every and --archs")
    return args


def report(compiled: dict[Variant, dict]) -> None:
    """One table per architecture."""
    for arch in dict.fromkeys(variant.arch for variant in compiled):
        rows = []
        for variant, row in compiled.items():
            if variant.arch == arch:
                kib = f"{row['shared'] / 1024:.1f}" if "shared" in row else ""
                tensor = row.get("tensor") or row.get("kernel_tensor", "")
                rows.append({**row, "variant": variant.name.removeprefix(f"{arch} "), "kib": kib, "tensor": tensor})
        print(f"\n{arch}\n{table(rows, COLUMNS)}")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.serve:
        serve()
        return 0
    started = time.monotonic()
    wanted = [v for v in gate_variants() if v.arch in args.archs] if args.gate else [
        v for arch in args.archs for v in (all_variants if args.every else variants)(arch)]
    compiled = compile_all(__file__, wanted, args.jobs)
    report(compiled)
    version = triton_version()
    print(f"\n{len(compiled)} variants by Triton {version} in {time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"triton": version, "variants": {v.name: r for v, r in compiled.items()}},
                                        indent=1), encoding="utf-8")
    if args.pin:
        wrong = pins.check(compiled, (), {"triton": "", "variants": {}}, version)
        if not wrong:
            pins.store(version, {variant.name: row for variant, row in compiled.items()})
    elif args.check:
        held = pins.load()
        wrong = pins.check(compiled, names(), held, version)
        if note := pins.version_note(held, version):
            print(note)
    else:
        wrong = pins.check(compiled, (), {"triton": "", "variants": {}}, version)
    if wrong:
        print(*wrong, sep="\n")
    if wrong and args.pin:
        print("Nothing was pinned: the hard limits come first.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
