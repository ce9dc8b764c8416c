"""Execute on a CPU the PTX that Triton compiles for GPUs that are not here, launched by the pack's own code.

    python benchmarks/executed_ptx.py [--archs sm_80 sm_89] [--gate | --all | --only TEXT] [--shuffle]

Prints one line per case and what is wrong with it; exit status 1 if something is, 2 without the executor. That is a
folder beside this repository (`../shared/ptx`, or LITEATTENTION_PTX), built by g++ on its first use. Every case makes
several calls of `lite_attention` on the same masks and compares outputs with float64, masks with float64 and the torch
backend, tile counts with the masks. The executor reports accesses out of bounds, misaligned or of memory that nobody
has written, races, copies read too early, divergence, and arguments that a kernel was not compiled for.

--gate: what a change of kernels, launch table or launch code has to pass (a minute for four architectures).
--all: also each of the node's settings for each head_dim and dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "kernels")]
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "liteattention_ptx_triton"))
from load_pack import load_pack  # noqa: E402

load_pack()
import kernel_oracle as oracle  # noqa: E402
import torch  # noqa: E402
from liteattention.kernels import MustKeep, SkipMask, Workspace, backend, lite_attention  # noqa: E402
from liteattention.kernels.launch_table import is_geforce  # noqa: E402
from liteattention.kernels.precision import INT8_GUARD  # noqa: E402
from liteattention.runtime.config import LiteAttentionConfig  # noqa: E402
from liteattention.runtime.rules import ErrorBudget, Rule, Threshold  # noqa: E402

EXECUTOR = Path(os.environ.get("LITEATTENTION_PTX") or ROOT.parent / "shared" / "ptx")
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_120")
NODE = LiteAttentionConfig()
"""The node's settings as they come."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ERROR = {"bf16": 1.2e-2, "fp16": 2.5e-3, "fp32": 2e-5, "int8": 1.5e-2}
"""Largest error over largest value, from the same inputs (INT8: from the quantised ones); pooled: twice that."""
CLOSE = {"bf16": 0.02, "fp16": 0.02, "fp32": 1e-3}
"""log2 units within which rounding may turn a decision; pooled: four times that, and 0.05 more in INT8."""


@dataclass(frozen=True)
class Case:
    """Calls on one set of masks, one per batch entry.

    Attributes:
        steps: "record" or "read", one call each; "holes" makes random tiles of the mask inactive.
        layout: "strided" ([B, N, H, D] memory), "packed", "contiguous", "fused" (one qkv buffer), "unaligned" by one
            element, or "far": tokens 2^24 - 16 elements apart, so that offsets pass 32 bits.
        strength: factor on q and k; with the default most tiles are dropped without pooling and about half with it.
        geforce: only where GeForce cards have the architecture.
    """

    name: str
    dtype: str = "bf16"
    d: int = 128
    n_q: int = 300
    n_k: int = 300
    heads: int = 1
    batch: int = 1
    steps: tuple[str, ...] = ("record", "record", "read")
    rule: Rule = NODE.rule
    pooled: bool = NODE.pool_skipped
    int8: bool = False
    lse: bool = False
    must: MustKeep | None = None
    layout: str = "strided"
    strength: float = 0.35
    geforce: bool = False


@dataclass
class Result:
    """faults: what is wrong. error: largest, over the largest value. decided, dropped, close: tiles that recording calls
    judged and dropped, and decisions within rounding of the threshold that float64 makes the other way."""

    faults: list[str] = field(default_factory=list)
    error: float = 0.0
    decided: int = 0
    dropped: int = 0
    close: int = 0
    launches: int = 0
    instructions: int = 0
    seconds: float = 0.0


_RUN = dict(n_q=513, n_k=513, steps=("record", "record", "holes", "record"))
GATE = (
    Case("defaults", heads=2, **_RUN),
    Case("defaults, INT8", int8=True, geforce=True, **_RUN),
    Case("threshold rule, batch of 2, D 64", "fp16", 64, rule=Threshold(-2.5), heads=2, batch=2),
    Case("threshold rule, INT8, packed, 300 x 513, D 64", "fp16", 64, 300, 513, heads=2, rule=Threshold(-1.5),
         int8=True, layout="packed"),
    Case("threshold rule, not pooled, text stays, packed, D 96", d=96, n_k=640, rule=Threshold(-4), pooled=False,
         must=MustKeep(keys=((140, 200),)), layout="packed", strength=1, steps=("record", "record")),
    Case("text stays, whole tiles, D 64", d=64, n_q=256, n_k=384, must=MustKeep(keys=((300, 384),), queries=((0, 9),)),
         layout="fused" if False else "contiguous", steps=("record", "record")),
    Case("D 96, 130 x 512", "fp16", 96, 130, 512, steps=("record", "read")),
    Case("float32, LSE", "fp32", n_q=130, n_k=300, lse=True, steps=("record", "read")),
    Case("reading, LSE, 300 x 513", "fp16", 128, 300, 513, lse=True, steps=("holes", "read")),
    Case("reading, not pooled, LSE, unaligned", d=64, pooled=False, lse=True, layout="unaligned",
         steps=("holes", "read")),
    Case("two words of mask, D 64", d=64, n_q=130, n_k=4300, steps=("record", "record")),
    Case("offsets beyond 32 bits", n_q=130, layout="far", steps=("holes", "record")),
)


def every_setting() -> list[Case]:
    """Each of the node's settings for each head_dim and dtype, on ragged and on whole tiles."""
    cases = []
    for rule in (ErrorBudget(), Threshold(-2.5)):
        for pooled in (True, False):
            for int8, dtype in ((False, "bf16"), (False, "fp16"), (True, "bf16"), (True, "fp16"), (False, "fp32")):
                for d in (64, 96, 128):
                    for n in (300, 384):
                        name = f"{rule.text}{'' if pooled else ', not pooled'}{', INT8' * int8}, {dtype}, D {d}, {n}"
                        cases.append(Case(name, dtype, d, 130, n, 1, 2, ("record", "holes", "record"), rule, pooled,
                                          int8))
    return cases


def missing() -> str:
    """Why nothing can be executed here, or ""."""
    if not (EXECUTOR / "gpu.py").is_file():
        return "the PTX executor is not here (LITEATTENTION_PTX, or ../shared/ptx beside the repository)"
    if find_spec("triton") is None or not (Path(find_spec("triton").origin).parent / "backends" / "nvidia").is_dir():
        return "the PTX executor needs Triton with its compiler for NVIDIA"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1: Triton interprets in this process and compiles nothing"
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"):
        return "the PTX executor needs g++ on x86-64"
    return ""


@lru_cache(maxsize=1)
def executor() -> type:
    """Its driver of Triton, which also keeps the arguments of the last attention launch."""
    sys.path.insert(0, str(EXECUTOR))
    try:
        import gpu
    finally:
        sys.path.remove(str(EXECUTOR))
    import triton

    class Launcher(gpu._Launcher):
        def __init__(self, src, metadata):
            # The executor follows the addresses in a table of this name.
            names = {name: "rows_ptr" if name == "masks_ptr" else name for name in src.fn.arg_names}
            super().__init__(SimpleNamespace(fn=SimpleNamespace(arg_names=list(names.values())), attrs=src.attrs,
                                             signature={names[n]: kind for n, kind in src.signature.items()},
                                             constants=src.constants), metadata)

        def __call__(self, *launch):
            if self.compiled.metadata.name == "attention_kernel":
                given = launch[-len(self.src.fn.arg_names):]
                self.gpu.attention = {name: getattr(x, "base", x) for name, x in zip(self.src.fn.arg_names, given)}
            super().__call__(*launch)

    class GPU(gpu.EmulatedGPU):
        attention: dict = {}

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.launcher_cls = Launcher

        def __enter__(self):
            triton.knobs.runtime.add_stages_inspection_hook = _without_assembler
            return super().__enter__()

        def __exit__(self, *error):
            triton.knobs.runtime.add_stages_inspection_hook = None
            super().__exit__(*error)
    return GPU


def _without_assembler(*stages) -> tuple[str, str] | None:
    """A hook of Triton's compiler: the PTX is what runs, and assembling it takes half of the compiler's time."""
    if not stages:
        return "no assembler", "no assembler"
    stages[1]["cubin"] = lambda source, metadata: b""


@contextlib.contextmanager
def as_on(gpu):
    """The pack takes CPU tensors for those of a GPU of this architecture."""
    verdict = SimpleNamespace(usable=True, reason="", pool_skipped=True, pooled=True)
    saved = [(module, name, getattr(module, name)) for key, module in list(sys.modules.items())
             for name in ("architecture", "triton_verdict")
             if key.startswith("liteattention.kernels") and hasattr(module, name)]
    for module, name, _ in saved:
        setattr(module, name, (lambda device: gpu.arch) if name == "architecture" else lambda device: verdict)
    try:
        yield
    finally:
        for module, name, was in saved:
            setattr(module, name, was)


def inputs(c: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, H, N, D]: key tiles differ in strength, and in value, so that pooling the wrong ones shows."""
    def placed(x: torch.Tensor) -> torch.Tensor:
        batch, heads, n, d = x.shape
        if c.layout == "unaligned":
            y = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(batch, n, heads, d).transpose(1, 2)
        elif c.layout == "far":
            stride = 2**24 - 16
            size = ((n - 1) * stride + heads * d) * x.element_size()
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # reserves no memory
            area.madvise(mmap.MADV_NOHUGEPAGE)
            y = torch.frombuffer(area, dtype=x.dtype).as_strided(x.shape, (stride, d, stride, 1))
        else:
            return x
        return y.copy_(x)

    layout = c.layout if c.layout in ("contiguous", "fused") else "strided"
    q, k, v = oracle.make(c.batch, c.heads, c.n_q, c.n_k, c.d, torch.float32, layout)
    v += torch.arange(c.n_k)[:, None] // 128 % 3 - 1
    return tuple(placed((x * s).to(DTYPES[c.dtype])) for x, s in ((q, c.strength), (k, c.strength), (v, 1)))


def dequantised(attention: dict, q, k, v, faults: list[str]) -> tuple[torch.Tensor, ...]:
    """What the INT8 copies of the last launch stand for, float32 (k less its mean), checked against the inputs."""
    def spread(scale: torch.Tensor, n: int) -> torch.Tensor:
        scale = scale.view(*q.shape[:2], -1)
        return (scale if scale.shape[2] == n else scale.repeat_interleave(128, 2)[..., :n])[..., None]

    copies = []
    for name, x, steps in (("q", q, 0.51), ("k", k.double() - k.double().mean(2, keepdim=True), 0.51), ("v", v, 0.01)):
        held = attention[f"{name}_ptr"]
        if held.dtype == v.dtype and name == "v":
            copies.append(v.float())
            continue
        unit = spread(attention[f"{name}_scale_ptr"], x.shape[2])
        copies.append(held.float() * unit)
        # v's copy is float16 and rounds by its own size.
        size = unit if name != "v" else unit * held.float().abs().clamp_min(1e-2)
        off = ((copies[-1] - x.double()) / size).abs().max().item()
        if not off <= steps:
            faults.append(f"RESULT: the copy of {name} is off by {off:.3f} steps")
    return tuple(copies)


def run_case(c: Case, arch: str, *, shuffle: bool = False, **gpu_options) -> Result:
    """gpu_options: those of the executor's driver, which can change the PTX before it runs."""
    result, started = Result(), time.monotonic()
    faults = result.faults
    q, k, v = inputs(c)
    shape = (c.batch, c.heads, -(-c.n_q // 128), -(-c.n_k // 128))
    masks = [SkipMask.full(1, c.heads, c.n_q, c.n_k) for _ in range(c.batch)]
    twins = [m.clone() for m in masks]
    test = c.rule.skip_test(None, 0, c.n_k)
    workspace = Workspace()
    close = CLOSE[c.dtype] * (4 if c.pooled else 1) + (0.05 if c.int8 and c.pooled else 0)
    limit = ERROR["int8" if c.int8 else c.dtype] * (2 if c.pooled else 1)

    def bits(of: list[SkipMask]) -> torch.Tensor:
        return torch.cat([m.to_bool() for m in of])

    with executor()(arch, order=2 if shuffle else 0, shuffle=shuffle, **gpu_options) as gpu, as_on(gpu):
        gpu.masks = [(f"mask of batch entry {b}", m.words[0]) for b, m in enumerate(masks)]
        for number, step in enumerate(c.steps):
            if step == "holes":
                kept = oracle.holes(*shape[:2], c.n_q, c.n_k, 0.6, seed=number)
                for b, m in enumerate(masks):
                    m.words &= SkipMask.from_bool(kept[b:b + 1], c.n_q, c.n_k).words
                continue
            recording, before, words = step == "record", bits(masks), [m.words.clone() for m in masks]
            backwards = [bool(m.passes[0] & 1) for m in masks]
            for twin, m in zip(twins, masks, strict=True):
                twin.words.copy_(m.words)
            options = dict(threshold=test.threshold, criterion=test.criterion, record=recording,
                           pool_skipped=c.pooled, must_keep=c.must)
            packed = c.layout == "packed"
            given = [x.transpose(1, 2).flatten(2) for x in (q, k, v)] if packed else (q, k, v)
            computed = torch.zeros(3, dtype=torch.int64)
            with gpu.poisoned():
                got = lite_attention(*given, masks, heads=c.heads if packed else None, return_lse=c.lse,
                                     backend="triton", precision="int8" if c.int8 else "full", workspace=workspace,
                                     computed=computed, **options)
            out, lse = got if c.lse else (got, None)
            if gpu.unwritten(out) or c.lse and gpu.unwritten(lse):
                faults.append(f"RESULT: a part of the output was never written in step {number}")
            out = out.unflatten(2, (c.heads, c.d)).transpose(1, 2) if packed else out
            same = dequantised(gpu.attention, q, k, v, faults) if c.int8 else (q, k, v)
            options["threshold"] -= INT8_GUARD if c.int8 else 0
            want = oracle.attention(*same, before, options["threshold"], backwards, None,
                                    c.must and c.must.tile_mask(c.n_q, c.n_k), test.criterion == "mass", c.pooled)
            error = ((out - want.out).abs().max() / want.out.abs().max()).item()
            result.error = max(result.error, error if math.isfinite(error) else math.inf)
            if not error <= limit:
                faults.append(f"RESULT: error {error:.1e} in step {number}, at most {limit:.1e}")
            if c.lse and not (lse - want.lse).abs().max() <= (2e-2 if c.pooled else 2e-3):
                faults.append(f"RESULT: LSE is off by {(lse - want.lse).abs().max():.1e} in step {number}")
            if computed.sum() != before.sum():
                faults.append(f"RESULT: counted {computed.sum()} tiles of {before.sum()} in step {number}")
            after = bits(masks)
            if not recording:
                if not all(map(torch.equal, words, (m.words for m in masks))):
                    faults.append(f"RESULT: the mask has changed in reading step {number}")
                continue
            lite_attention(*same, twins, backend="torch", **options)
            near = want.margin <= close
            for other, decisions in (("float64's", want.keep & before), ("the torch backend's", bits(twins))):
                wrong = (after != decisions) & ~near
                if wrong.any():
                    first = wrong.nonzero()[0].tolist()
                    faults.append(f"RESULT: {int(wrong.sum())} decisions of step {number} are not {other}, first "
                                  f"{first} at {want.margin[tuple(first)]:.3f} from the threshold")
            stray = [m for m in masks if not torch.equal(m.words, SkipMask.from_bool(m.to_bool(), c.n_q, c.n_k).words)]
            if stray:
                faults.append(f"RESULT: bits beyond the last tile are set in step {number}")
            result.close += int(((after != want.keep & before) & near).sum())
            result.decided += int(before.sum())
            result.dropped += int((before & ~after).sum())
        if "record" in c.steps and not 0 < result.dropped < result.decided:
            faults.append(f"RESULT: {result.dropped} of {result.decided} tiles dropped: this case shows nothing")
        faults += [f for f in dict.fromkeys(gpu.faults) if not replicated_load(f)]
        result.launches, result.instructions = len(gpu.launches), sum(launch[2] for launch in gpu.launches)
    result.seconds = time.monotonic() - started
    return result


def replicated_load(fault: str) -> bool:
    """Whether a fault is the one that the tile list kernel explains: behind its barrier, a warp loads words into
    registers that it does not use while another rewrites them."""
    lines = [(ROOT / "kernels" / name, int(line)) for name, line in re.findall(r"(\w+\.py):(\d+) `", fault)]
    if not fault.startswith("GLOBAL-RACE between warps") or len(lines) != 2 or lines[0][0] != lines[1][0]:
        return False
    source = lines[0][0].read_text(encoding="utf-8").splitlines()
    barrier = next((n for n, text in enumerate(source, 1) if "tl.debug_barrier()" in text), math.inf)
    return "tile_list" in lines[0][0].name and all(line > barrier for _, line in lines)


def cases(arch: str, wanted=GATE) -> list[Case]:
    """Those for this architecture."""
    return [c for c in wanted if is_geforce(arch) or not c.geforce]


def line(arch: str, c: Case, result: Result) -> str:
    mask = f", dropped {result.dropped} of {result.decided}, {result.close} close" if result.decided else ""
    return (f"{'FAIL' if result.faults else 'ok  '} {arch} {c.name}: error {result.error:.1e}{mask}; {result.launches} "
            f"launches, {result.instructions / 1e6:.1f} M instructions, {result.seconds:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), metavar="ARCH", help=f"default: {' '.join(ARCHS)}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gate", action="store_true", help="the cases that the tests run (default)")
    which.add_argument("--all", action="store_true", help="these and each of the node's settings")
    parser.add_argument("--only", default="", help="of these, the ones with this in their name")
    parser.add_argument("--shuffle", action="store_true", help="programs and slices of warps in random order")
    args = parser.parse_args(arguments)
    if why := missing():
        print(why)
        return 2
    torch.set_num_threads(1)
    started, failed, n = time.monotonic(), 0, 0
    for arch in args.archs:
        for case in cases(arch, (*GATE, *every_setting()) if args.all else GATE):
            if args.only in case.name:
                result = run_case(case, arch, shuffle=args.shuffle)
                print(line(arch, case, result), *(f"       {text[:400]}" for text in result.faults[:8]), sep="\n",
                      flush=True)
                failed, n = failed + bool(result.faults), n + 1
    print(f"{failed} of {n} cases failed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
