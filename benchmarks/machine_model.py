"""Predict milliseconds per call on GPUs that are not here, from the instructions of the compiled kernels.

    python benchmarks/machine_model.py [--gpu H200] [--measured results/NAME.json]

PREDICTIONS, not measurements: the counts of `static_pins.json` against public peak rates, with the masks of
`attention.py` and a schedule of programs over SMs (`support/machine.py` states every rate and assumption). What it is
for: which unit limits a variant, what a sparsity can be worth, whether the last rows leave a GPU idle. With
--measured, a result of `attention.py` on an H200 or RTX 4090 stands beside the predictions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from attention import GPU_SHAPES, SPARSITIES  # noqa: E402
from support import pins  # noqa: E402
from support.machine import MACHINES, PUBLISHED, TILE, Call, Machine, TileCost, launch_of, predict, tile_cost  # noqa: E402
from support.report import table  # noqa: E402

FORMS = {"dense": "dense", "list": "read", "read": "read", "record": "record"}
"""Form of a contender in `attention.py` -> form of the kernel."""
COST_ORDER_MAX_TOKENS = 16384
TILE_COLUMNS = {"variant": "variant", "tile": "tile", "resident": "programs/SM", "tensor": "tensor", "exp2": "exp2",
                "issue": "issue", "shared": "shared", "l2": "l2", "overlapped": "overlapped", "serial": "serial",
                "cycles": "taken"}
CALL_COLUMNS = {"variant": "variant", "sparsity": "skipped", "ms": "ms", "tflops": "TFLOP/s", "speedup": "x dense",
                "efficiency": "efficiency", "beside": "beside", "balance": "balance", "limit": "limit"}
MEASURED_COLUMNS = {"variant": "contender", "tokens": "tokens", "heads": "heads", "head_dim": "D",
                    "sparsity": "skipped", "ms": "predicted ms", "measured_ms": "measured ms", "ratio": "ratio"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=[m.name for m in MACHINES], help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[n for n, _ in GPU_SHAPES])
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    parser.add_argument("--sparsity", type=float, nargs="+", default=sorted(SPARSITIES))
    parser.add_argument("--measured", type=Path, help="a result of attention.py to put beside the predictions")
    return parser.parse_args(arguments)


@lru_cache(maxsize=64)
def row_counts(tokens: int, heads: int, sparsity: float) -> tuple[int, ...]:
    """Active mask tiles of each row, in the order of the grid, for the masks of `attention.py`."""
    from support.masks import realistic_bits

    if sparsity == 0:
        n = -(-tokens // TILE)
        return (n,) * (heads * n)
    return tuple(realistic_bits(heads, tokens, sparsity)[0].sum(-1).flatten().tolist())


class Model:
    """The predictions for one GPU, from pinned counts: `variants` of `static_pins.json`."""

    def __init__(self, machine: Machine, variants: dict):
        self.machine = machine
        self.variants = variants

    def pin(self, form: str, head_dim: int, int8: bool) -> dict | None:
        """The variant with a loop for a partial tile: only that form is pinned for all. None: not pinned."""
        return self.variants.get(
            f"{self.machine.arch} {form} d{head_dim} bf16{' int8' if int8 else ''} ragged")

    def cost(self, form: str, head_dim: int, int8: bool) -> TileCost | None:
        pin = self.pin(form, head_dim, int8)
        return None if pin is None else tile_cost(self.machine, pin, head_dim, int8)

    def call(self, form: str, tokens: int, heads: int, head_dim: int, sparsity: float, int8: bool = False
             ) -> Call | None:
        """form: "dense", "list", "read" or "record". None: no such variant is pinned; a reader stands in for the
        dense loop, whose instructions are the same but for the list."""
        kernel = FORMS[form] if self.pin(FORMS[form], head_dim, int8) else "read" if form == "dense" else FORMS[form]
        cost = self.cost(kernel, head_dim, int8)
        if cost is None:
            return None
        pin = self.pin(kernel, head_dim, int8)
        expand = None if form == "dense" else self.variants[
            f"{self.machine.arch} expand{' record' if form == 'record' else ''}"]
        counts = row_counts(tokens, heads, 0.0 if form in ("dense", "list") else sparsity)
        return predict(self.machine, cost, launch_of(pin)[1], counts, tokens=tokens, heads=heads, head_dim=head_dim,
                       sorted_rows=form != "dense" and tokens < COST_ORDER_MAX_TOKENS, expand=expand, int8=int8,
                       v_fp16="HMMA.16816.F16" in pin["tensor"])

    def tiles(self, head_dim: int) -> list[dict]:
        """Cycles per compute tile, one row a variant."""
        rows = []
        for int8 in (False, True):
            for form in ("dense", "read", "record"):
                if (cost := self.cost(form, head_dim, int8)) is not None:
                    units = {x: round(getattr(cost, x)) for x in ("tensor", "exp2", "issue", "shared", "l2",
                                                                  "overlapped", "serial", "cycles")}
                    rows.append({"variant": form + (" int8" if int8 else ""), "resident": cost.resident,
                                 "tile": self.pin(form, head_dim, int8)["launch"], **units})
        return rows

    def calls(self, tokens: int, heads: int, head_dim: int, sparsities: list[float]) -> list[dict]:
        """One row per variant and sparsity."""
        rows, dense = [], self.call("dense", tokens, heads, head_dim, 0.0)
        for int8 in (False, True):
            full = self.call("list", tokens, heads, head_dim, 0.0, int8)
            for form in ("dense", "read", "record"):
                for sparsity in [0.0] if form == "dense" else sparsities:
                    call = self.call(form, tokens, heads, head_dim, sparsity, int8)
                    if call is None:
                        continue
                    flops = 4.0 * tokens ** 2 * heads * head_dim * (1 - sparsity)
                    rows.append({
                        "variant": form + (" int8" if int8 else ""), "sparsity": sparsity, "ms": call.ms,
                        "tflops": flops / call.ms / 1e9, "speedup": dense.ms / call.ms,
                        "efficiency": full.ms * (1 - sparsity) / call.ms if form == "read" else None,
                        "beside": f"{100 * call.beside_ms / call.ms:.1f} %", "balance": call.balance,
                        "limit": call.limit})
        return rows


def beside_measured(result: dict, variants: dict) -> list[dict]:
    """Predicted beside measured times of a result of `attention.py`; ratio: measured over predicted.

    Raises:
        ValueError: the result is of a GPU without a model.
    """
    machine = next((m for m in MACHINES if m.name in str(result.get("device"))), None)
    if machine is None:
        raise ValueError(f"the result is of {result.get('device')!r}; there are models of "
                         f"{', '.join(m.name for m in MACHINES)}")
    model, rows = Model(machine, variants), []
    for row in result["rows"]:
        # Packages of others are contenders too; ours are named by form and precision.
        if row.get("median_ms") is None or row["contender"] != f"{row['form']} {row['precision']}":
            continue
        if row["form"] not in FORMS or row["dtype"] == "float32":
            continue
        call = model.call(row["form"], row["tokens"], row["heads"], row["head_dim"], row["sparsity"],
                          row["precision"] == "int8")
        if call is not None:
            rows.append({**row, "variant": row["contender"], "ms": call.ms, "measured_ms": row["median_ms"],
                         "ratio": row["median_ms"] / call.ms})
    return rows


def published(variants: dict) -> list[dict]:
    """The model's dense loop at 16384 tokens beside what others measured with kernels like it."""
    rows = []
    for machine, head_dim, what, low, high in PUBLISHED:
        call = Model(machine, variants).call("dense", 16384, 24, head_dim, 0.0)
        tflops = 4.0 * 16384 ** 2 * 24 * head_dim / call.ms / 1e9
        rows.append({"machine": machine.name, "head_dim": head_dim, "what": what,
                     "published": f"{low} to {high}" if high > low else str(low),
                     "predicted": round(tflops), "miss": f"{100 * (tflops / ((low + high) / 2) - 1):+.0f} %"})
    return rows


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    held = pins.load()
    variants = held["variants"]
    print(f"PREDICTIONS from instruction counts (Triton {held['triton']}) and public peak rates. Not measurements.\n"
          "x dense: over our own dense loop; efficiency: t(0)(1-s)/t(s) with the list loop; beside: expansion,\n"
          "quantisation and launches; balance: work / (last end * SMs).")
    if args.measured:
        try:
            rows = beside_measured(json.loads(args.measured.read_text(encoding="utf-8")), variants)
        except ValueError as error:
            sys.exit(str(error))
        print(f"\nPredicted beside measured\n{table(rows, MEASURED_COLUMNS)}")
        if rows:
            ratios = [row["ratio"] for row in rows]
            print(f"\nmeasured / predicted: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to "
                  f"{max(ratios):.2f} in {len(ratios)} rows")
        return 0
    heads = dict(GPU_SHAPES)
    for machine in MACHINES:
        if args.gpu not in (None, machine.name):
            continue
        model = Model(machine, variants)
        print(f"\n{machine.name}, predicted: cycles that a compute tile keeps each unit of an SM busy, D = "
              f"{args.head_dim}\n{table(model.tiles(args.head_dim), TILE_COLUMNS)}")
        for tokens in args.tokens:
            rows = model.calls(tokens, heads.get(tokens, 24), args.head_dim, args.sparsity)
            print(f"\n{machine.name}, predicted: {tokens} tokens, {heads.get(tokens, 24)} heads\n"
                  f"{table(rows, CALL_COLUMNS)}")
    print("\nThe dense loop's prediction beside what others measured with kernels scheduled alike (TFLOP/s)")
    print(table(published(variants), {"machine": "model", "head_dim": "D", "what": "measured by others",
                                      "published": "published", "predicted": "predicted", "miss": "miss"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
