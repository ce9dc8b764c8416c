"""Execute on a CPU the PTX that Triton compiles for GPUs that are not here, launched by the pack's own code.

    python benchmarks/executed_ptx.py [--archs sm_80 sm_89] [--gate | --all] [--only TEXT] [--shuffle]

Prints one line per case and what is wrong with it; exit status 1 if something is, 2 where nothing can be executed. The
executor is a folder beside this repository (`../shared/ptx`, or LITEATTENTION_PTX), built by g++ on its first use. A
case makes a few calls of `lite_attention` on the same masks. Outputs are compared with float64, masks with float64 and
the torch backend, tile counts with the masks. The executor reports accesses out of bounds, misaligned or of memory that
nobody has written, races, copies read too early, divergence, and arguments that a kernel was not compiled for.

--gate (default) is what a change of kernels, launch table or launch code has to pass: for four architectures about
three minutes. --all: also every form that a run can launch.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "liteattention_ptx_triton"))
from load_pack import load_pack  # noqa: E402

load_pack()
import torch  # noqa: E402
from support.executor import as_on, executor, missing  # noqa: E402

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention, reference  # noqa: E402
from liteattention.kernels.forms import Form, default_forms, launchable  # noqa: E402
from liteattention.kernels.launch_table import serves_hopper  # noqa: E402
from liteattention.kernels.precision import INT8_GUARD, precision_on  # noqa: E402
from liteattention.runtime.rules import ErrorBudget, Threshold  # noqa: E402

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_120")
RULES = {"mass": ErrorBudget(), "max": Threshold(-4.0)}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ERROR = {BF16: 1.2e-2, FP16: 2.5e-3, FP32: 2e-5, torch.int8: 1.5e-2}
"""Largest error over largest value, from the same inputs (INT8: from what its copies stand for); pooled: twice that."""
CLOSE = {BF16: 0.02, FP16: 0.02, FP32: 1e-3}
"""log2 units within which rounding may turn a decision; pooled: four times that, and 0.05 more in INT8."""


@dataclass(frozen=True)
class Case:
    """Calls on one set of masks, one mask per batch entry.

    Attributes:
        steps: "record" or "read" for a call; "holes" makes random tiles of the masks inactive.
        hopper: by the kernel for Hopper.
        layout: "strided" ([B, N, H, D] memory), "packed", "contiguous", "unaligned" (by one element), or "far": tokens
            2^24 - 16 elements apart, so that offsets pass 32 bits.
    """

    name: str
    d: int = 128
    dtype: torch.dtype = BF16
    criterion: str = "mass"
    int8: bool = False
    pooled: bool = True
    n_q: int = 300
    n_k: int = 300
    heads: int = 1
    batch: int = 1
    steps: tuple[str, ...] = ("record", "record")
    layout: str = "strided"
    must: MustKeep | None = None
    lse: bool = False
    hopper: bool = False

    @classmethod
    def of(cls, form: Form, n_q: int, n_k: int, **more) -> Case:
        return cls(form.name, form.head_dim, form.dtype, form.criterion, form.int8, form.pool_skipped, n_q, n_k, **more)


@dataclass
class Result:
    """faults: what is wrong. error: largest, over the largest value. decided, dropped: tiles in recording calls. close:
    decisions other than float64's within rounding of the threshold."""

    faults: list[str] = field(default_factory=list)
    error: float = 0.0
    decided: int = 0
    dropped: int = 0
    close: int = 0
    seconds: float = 0.0


EMPTY = ("record", "holes", "holes", "read", "record")
READING = dict(steps=("holes", "read"), lse=True)
OTHERS = (
    Case("packed, text stays", 64, FP16, n_q=256, n_k=384, heads=2, layout="packed", must=MustKeep(keys=((300, 384),))),
    Case("max, not pooled, first rows stay", 96, FP16, "max", pooled=False, n_k=640, layout="contiguous",
         must=MustKeep(queries=((0, 9),))),
    Case("head_dim 96", 96, n_q=130, heads=2),
    Case("float32, LSE", 128, FP32, n_q=130, lse=True, steps=("record", "read")),
    Case("max, INT8, unaligned", 64, FP16, "max", int8=True, n_k=513, layout="unaligned", steps=("record", "read")),
    Case("reading, LSE", 128, FP16, n_k=513, **READING),
    Case("reading, LSE, not pooled, unaligned", 64, pooled=False, layout="unaligned", **READING),
    Case("two mask words", 64, n_q=130, n_k=4300),
    Case("max, whole tiles", 128, FP16, "max", n_q=256, n_k=768, heads=2, lse=True, steps=("record", "record", "read")),
    Case("empty lists", 64, n_q=260, heads=2, steps=EMPTY),
    Case("empty lists, not pooled", 64, n_q=260, n_k=384, heads=2, pooled=False, steps=EMPTY),
    Case("offsets beyond 32 bits", n_q=130, layout="far", steps=("record", "holes", "record")),
)


def gate(arch: str) -> list[Case]:
    """What the node's defaults launch, its two rules, recording on a full and on a shrunken mask; and one case of each
    other property of a call. What the kernel for Hopper takes also by that."""
    defaults = [Case.of(form, 513, 513, batch=2, steps=("record", "record", "holes", "record"))
                for form in default_forms(arch)]
    cases = defaults + [c for c in OTHERS if not c.int8 or precision_on(arch, c.dtype, c.n_k, "int8").name == "int8"]
    return cases + [replace(c, name=f"Hopper: {c.name}", hopper=True) for c in cases
                    if serves_hopper(arch, c.d, c.dtype, c.int8)]


def every_form(arch: str) -> list[Case]:
    return [Case.of(form, 130, 300 if form.ragged else 384, heads=2, steps=("record", "holes", "record"))
            for form in launchable(arch)]


def inputs(c: Case) -> list[torch.Tensor]:
    """q, k, v [B, H, N, D] whose key tiles differ in strength (log2 units, whatever D) and in value."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(c.batch, n, c.heads, c.d, generator=generator) for n in (c.n_q, c.n_k, c.n_k))
    tile = torch.arange(c.n_k)[:, None] // 128
    q, k = 0.1 * q, 0.1 * k
    q[..., 0] += math.sqrt(c.d)
    k[..., 0] *= 3
    v += tile[..., None] % 3 - 1 + 3 * k[..., :1]
    k[..., 0] += math.log(2) * torch.tensor([0, -7.5, -4.5, 1, -6, -1.5, -9, -3])[tile % 8]
    return [_placed(x.to(c.dtype).transpose(1, 2), c.layout) for x in (q, k, v)]


def _placed(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x in another layout of memory."""
    batch, heads, n, d = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "unaligned":
        y = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(batch, n, heads, d).transpose(1, 2)
    elif layout == "far":
        stride = 2**24 - 16
        size = ((n - 1) * stride + heads * d) * x.itemsize
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # reserves no memory
        area.madvise(mmap.MADV_NOHUGEPAGE)
        y = torch.frombuffer(area, dtype=x.dtype).as_strided(x.shape, (stride, d, stride, 1))
    else:
        return x
    return y.copy_(x)


def int8_inputs(launched: dict, q, k, v, faults: list[str]) -> list[torch.Tensor]:
    """float32 q, k less its mean, and v that the copies given to the last launch stand for, held to the inputs."""
    found, attention = [], launched["attention_kernel"]
    balance = launched["quantize_kernel"]["balance_ptr"]
    if not (balance.log2() == balance.log2().round().clamp(-4, 4)).all():
        faults.append("RESULT: channels are not balanced by powers of two from 1/16 to 16")
    for name, x, factor in (("q", q, balance), ("k", k.double() - k.double().mean(2, keepdim=True), 1 / balance),
                            ("v", v, 1.0)):
        copy, unit = attention[f"{name}_ptr"], attention[f"{name}_scale_ptr"]
        if unit is None:
            found.append(copy.float())
            continue
        unit = unit.view(*x.shape[:2], -1, 1)
        unit = (unit if name == "q" else unit.repeat_interleave(128, 2)[:, :, :x.shape[2]]) * factor
        found.append(copy.float() * unit)
        # In steps of INT8, or of float16, which rounds by the size of the number.
        step = unit if name != "v" else unit * copy.float().abs().clamp_min(2.0**-14) * 2.0**-10
        off = ((found[-1] - x.double()) / step).abs().max().item()
        if not off < 0.51:
            faults.append(f"RESULT: the copy of {name} is off by {off:.2f} steps")
    return found


def run_case(c: Case, arch: str, *, order: int = 0, **gpu_options) -> Result:
    """order: of warps, 0 or 1 as far as they come, the first or the last first, 2 in random slices. gpu_options: others
    of the executor's driver, which can change the PTX before it runs."""
    result, started = Result(), time.monotonic()
    q, k, v = inputs(c)
    masks = [SkipMask.full(1, c.heads, c.n_q, c.n_k) for _ in range(c.batch)]
    twins, workspace = [m.clone() for m in masks], Workspace()
    test = RULES[c.criterion].skip_test(None, 0, c.n_k)
    with executor()(arch, order=order, **gpu_options) as gpu, as_on(arch, c.hopper):
        gpu.masks = [(f"mask of batch entry {b}", m.words[0]) for b, m in enumerate(masks)]
        for number, step in enumerate(c.steps):
            if step == "holes":
                for m in masks:
                    m.words &= _holes(m, number).words
                continue
            before, backwards = _bits(masks), [bool(m.passes[0] & 1) for m in masks]
            for twin, m in zip(twins, masks, strict=True):
                twin.words.copy_(m.words)
            options = dict(threshold=test.threshold, criterion=test.criterion, record=step == "record",
                           pool_skipped=c.pooled, must_keep=c.must)
            given = [x.transpose(1, 2).flatten(2) for x in (q, k, v)] if c.layout == "packed" else (q, k, v)
            computed = torch.zeros(3, dtype=torch.int64)
            with gpu.poisoned():
                got = lite_attention(*given, masks, heads=c.heads if c.layout == "packed" else None, return_lse=c.lse,
                                     backend="triton", precision="int8" if c.int8 else "full", workspace=workspace,
                                     computed=computed, **options)
            out, lse = got if c.lse else (got, None)
            faults = [f"RESULT: {name} was never written in part" for name, x in (("output", out), ("LSE", lse))
                      if x is not None and gpu.unwritten(x)]
            out = out.unflatten(2, (c.heads, c.d)).transpose(1, 2) if c.layout == "packed" else out
            same = int8_inputs(gpu.launched, q, k, v, faults) if c.int8 else (q, k, v)
            options["threshold"] -= INT8_GUARD * c.int8
            want = reference.attention(*same, before, options["threshold"], backwards, mass=c.criterion == "mass",
                                       must=c.must and c.must.tile_mask(c.n_q, c.n_k), pool_skipped=c.pooled)
            error, limit = _error(out, want.out), ERROR[torch.int8 if c.int8 else c.dtype] * (1 + c.pooled)
            result.error = max(result.error, error)
            if error > limit:
                faults.append(f"RESULT: error {error:.1e}, at most {limit:.1e}")
            if lse is not None and not (lse - want.lse).abs().max() <= (2e-2 if c.pooled else 2e-3):
                faults.append(f"RESULT: LSE is off by {(lse - want.lse).abs().max():.1e}")
            if computed.sum() != before.sum():
                faults.append(f"RESULT: {computed.sum()} tiles counted of {before.sum()}")
            if step == "record":
                lite_attention(*same, twins, backend="torch", **options)
                _judge(c, before, masks, twins, want, result, faults)
            elif not all(torch.equal(m.words, twin.words) for m, twin in zip(masks, twins, strict=True)):
                faults.append("RESULT: reading has changed the mask")
            result.faults += [f"{text} in step {number}" for text in faults]
        if "record" in c.steps and not 0 < result.dropped < result.decided:
            result.faults.append(f"RESULT: {result.dropped} of {result.decided} tiles dropped, which shows nothing")
        unwritten = [text for text in gpu.notes if "nobody wrote" in text]
        result.faults += [text for text in dict.fromkeys(gpu.faults + unwritten) if not _replicated_load(text)]
    result.seconds = time.monotonic() - started
    return result


def _bits(masks: list[SkipMask]) -> torch.Tensor:
    return torch.cat([m.to_bool() for m in masks])


def _holes(mask: SkipMask, seed: int) -> SkipMask:
    bits = torch.rand(mask.to_bool().shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    return SkipMask.from_bool(bits, mask.seqlen_q, mask.seqlen_k)


def _error(out: torch.Tensor, want: torch.Tensor) -> float:
    error = ((out - want).abs().max() / want.abs().max()).item()
    return error if math.isfinite(error) else math.inf


def _judge(c: Case, before: torch.Tensor, masks: list, twins: list, want, result: Result, faults: list[str]) -> None:
    """Decisions of one recording call."""
    after = _bits(masks)
    near = want.margin <= CLOSE[c.dtype] * (4 if c.pooled else 1) + 0.05 * (c.int8 and c.pooled)
    for other, decisions in (("float64's", want.keep & before), ("the torch backend's", _bits(twins))):
        wrong = (after != decisions) & ~near
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            faults.append(f"RESULT: {int(wrong.sum())} decisions are not {other}, first that of tile {first}, "
                          f"{want.margin[tuple(first)]:.3f} from the threshold,")
    if any((m.words != SkipMask.from_bool(m.to_bool(), c.n_q, c.n_k).words).any() for m in masks):
        faults.append("RESULT: mask bits beyond the last tile are set")
    result.close += int(((after != want.keep & before) & near).sum())
    result.decided += int(before.sum())
    result.dropped += int((before & ~after).sum())


def _replicated_load(fault: str) -> bool:
    """Whether a fault is the one that the tile lists' kernel explains: behind its barrier a warp loads words that it
    does not use while another rewrites them."""
    lines = re.findall(r"triton_tile_lists\.py:(\d+) `", fault)
    if not fault.startswith("GLOBAL-RACE between warps") or len(lines) != 2:
        return False
    source = (ROOT / "kernels" / "triton_tile_lists.py").read_text(encoding="utf-8").splitlines()
    return min(map(int, lines)) > next(n for n, text in enumerate(source, 1) if "tl.debug_barrier()" in text)


def line(arch: str, c: Case, r: Result) -> str:
    mask = f", dropped {r.dropped} of {r.decided}, {r.close} close" if r.decided else ""
    return f"{'FAIL' if r.faults else 'ok  '} {arch} {c.name}: error {r.error:.1e}{mask}, {r.seconds:.1f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), metavar="ARCH", help=f"default: {' '.join(ARCHS)}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gate", action="store_true", help="the cases that the tests run; the default")
    which.add_argument("--all", action="store_true", help="these and every form that a run can launch")
    parser.add_argument("--only", default="", help="the cases with this in their name")
    parser.add_argument("--shuffle", action="store_true", help="programs and slices of warps in random order")
    args = parser.parse_args(arguments)
    if why := missing():
        print(why)
        return 2
    torch.set_num_threads(1)
    started, results = time.monotonic(), []
    for arch in args.archs:
        for case in gate(arch) + (every_form(arch) if args.all else []):
            if args.only in case.name:
                results.append(run_case(case, arch, order=2 * args.shuffle, shuffle=args.shuffle))
                print(line(arch, case, results[-1]), *(f"       {text[:400]}" for text in results[-1].faults[:8]),
                      sep="\n", flush=True)
    failed = sum(bool(r.faults) for r in results)
    print(f"{failed} of {len(results)} cases failed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
