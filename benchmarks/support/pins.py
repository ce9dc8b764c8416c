"""What compiled kernels may not exceed, and how they are compared with the pinned figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from support.variants import DISASSEMBLED, HOPPER, SHARED_LIMIT, Variant, default_variants

PINS = Path(__file__).resolve().parent.parent / "static_pins.json"
REPIN = "python benchmarks/static.py --pin"

EXACT = ("launch", "spill", "atomics", "tensor", "notes", "copies", "exp2", "loop_spill", "overlapped")
"""Figures that any change of is a finding: for better or worse, the kernel has become another one."""
GROWTH = {"loop": (0.02, 0), "registers": (0.0, 8), "shared": (0.0, 0)}
"""Figures that may fall; and rise by this share of the pin and this number. Registers are handed out by eights."""
TWO_PROGRAMS = 128
"""Registers per thread up to which an SM holds two programs of 8 warps: what stays below may not rise above."""
KEPT = (*EXACT, *GROWTH, "instructions", "shared_reads")
"""What is written into the file. The last two are compared with nothing."""

OVERLAPPED = 64
"""Exponentials of a thread for one tile of scores. The kernel for Hopper computes them while a product is under way, or
it has no advantage."""
SPILL, LOOP_SPILL = 128, 12
"""Bytes that a kernel may spill if the node's defaults do not launch it, and loads and stores of them in the main loop.
Such are float32, three TF32 products whose operands leave no register free, and head_dim 96."""


def limits(variant: Variant, row: dict) -> list[str]:
    """What is wrong with a compiled kernel whatever its pin says."""
    found = []
    by_default = variant.kernel in HOPPER or variant in default_variants(variant.arch)
    for figure, most in (("spill", 0 if by_default else SPILL), ("loop_spill", 0 if by_default else LOOP_SPILL)):
        if row.get(figure, 0) > most:
            found.append(f"{figure} is {row[figure]}, at most {most}")
    if row["shared"] > 1024 * SHARED_LIMIT[variant.arch]:
        found.append(f"shared is {row['shared'] / 1024:.1f} KiB, {variant.arch} has {SHARED_LIMIT[variant.arch]}")
    if row["notes"]:
        found.append(f"the assembler serialises wgmma ({row['notes']})")
    if variant.kernel == "attention" and variant.arch in DISASSEMBLED:
        if not row.get("tensor"):
            found.append("there is no loop with tensor instructions")
        elif not row["copies"]:
            found.append("copies is 0: the main loop waits for every tile of k and v")
    if variant.kernel.startswith("hopper") and (n := row.get("overlapped") or 0) < OVERLAPPED:
        found.append(f"{n} exponentials are computed while a product is under way, at least {OVERLAPPED} should be")
    return [f"{variant.name}: {text}" for text in found]


def differences(name: str, row: dict, pin: dict) -> list[str]:
    """How a kernel differs from its pin by more than it may: variant, figure, old and new value, how to re-pin."""
    found = []
    for figure in (*EXACT, *GROWTH):
        old, new = pin.get(figure), row.get(figure)
        allowed = ""
        if figure in GROWTH and None not in (old, new):
            share, number = GROWTH[figure]
            most = int(old * (1 + share)) + number
            if figure == "registers" and old <= TWO_PROGRAMS:
                most = min(most, TWO_PROGRAMS)
            if new <= most:
                continue
            allowed = f" (at most {most})"
        if old != new:
            found.append(f"{name}: {figure} was {old}, is {new}{allowed}. If it is meant: {REPIN}")
    return found


def unmatched(names: Iterable[str], pinned: Iterable[str]) -> list[str]:
    """Variants without a pin and pins without a variant."""
    names, pinned = set(names), set(pinned)
    return ([f"{name}: has no pin. If it is meant: {REPIN}" for name in sorted(names - pinned)]
            + [f"{name}: is pinned but no longer among the variants. If it is meant: {REPIN}"
               for name in sorted(pinned - names)])


def load() -> dict:
    """The file: "triton": version that the figures belong to; "variants": figures by name."""
    return json.loads(PINS.read_text(encoding="utf-8"))


def store(triton: str, rows: dict[str, dict]) -> None:
    """Write the file anew, one variant a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps({k: row[k] for k in KEPT if k in row})}" for name, row in rows.items()]
    PINS.write_text(f'{{\n "triton": {json.dumps(triton)},\n "variants": {{\n' + ",\n".join(lines) + "\n }\n}\n",
                    encoding="utf-8")


def check(compiled: dict[Variant, dict], names: Iterable[str], pins: dict, triton: str) -> list[str]:
    """Everything that is wrong; nothing but the hard limits with another Triton than the pinned one.

    Args:
        compiled: the rows of what was compiled.
        names: of all variants there are, compiled or not.
        triton: the version that compiled them.
    """
    found = []
    for variant, row in compiled.items():
        if "problem" in row:
            found.append(f"{variant.name}: does not compile: {row['problem']}")
            continue
        found += limits(variant, row)
        if triton == pins["triton"] and variant.name in pins["variants"]:
            found += differences(variant.name, row, pins["variants"][variant.name])
    return found + unmatched(names, pins["variants"])


def version_note(pins: dict, triton: str) -> str:
    """Why the pins are not looked at, or ""."""
    if triton == pins["triton"]:
        return ""
    return f"Triton {triton} is not the pinned {pins['triton']}: only the hard limits are checked."
