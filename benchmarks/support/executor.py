"""The PTX executor beside this repository as a driver of Triton: where it is, and what the pack needs of it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from support.warp_specialised import specialised

EXECUTOR = Path(os.environ.get("LITEATTENTION_PTX") or Path(__file__).resolve().parents[3] / "shared" / "ptx")


def missing() -> str:
    """Why nothing can be executed here, or ""."""
    triton = find_spec("triton")
    if not (EXECUTOR / "gpu.py").is_file():
        return "no PTX executor here (LITEATTENTION_PTX, or ../shared/ptx beside the repository)"
    if triton is None or not (Path(triton.origin).parent / "backends" / "nvidia").is_dir():
        return "the PTX executor needs Triton with its compiler for NVIDIA"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1: Triton compiles nothing in this process"
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"):
        return "the PTX executor needs g++ on x86-64"
    return ""


@lru_cache(maxsize=1)
def executor() -> type:
    """The executor's driver of Triton, which also keeps the arguments of each kernel's last launch."""
    sys.path.insert(0, str(EXECUTOR))
    import gpu  # not `benchmarks/gpu.py`: the folder above comes first

    sys.path.remove(str(EXECUTOR))
    from triton import knobs

    class Launcher(gpu._Launcher):
        def __init__(self, source, metadata):
            # The executor follows the addresses in a table of this name.
            names = {name: "rows_ptr" if name == "masks_ptr" else name for name in source.fn.arg_names}
            super().__init__(SimpleNamespace(fn=SimpleNamespace(arg_names=list(names.values())), attrs=source.attrs,
                                             signature={names[n]: kind for n, kind in source.signature.items()},
                                             constants=source.constants), metadata)

        def attach(self, compiled):
            self.compiled = SimpleNamespace(asm={"ptx": _spelled_out(compiled.asm["ptx"])}, metadata=compiled.metadata,
                                            hash=compiled.hash)

        def __call__(self, *launch):
            given = zip(self.src.fn.arg_names, launch[-len(self.src.fn.arg_names):], strict=True)
            self.gpu.launched[self.compiled.metadata.name] = {name: getattr(x, "base", x) for name, x in given}
            branching = "setmaxnreg" in self.compiled.asm["ptx"]
            with specialised(gpu.ptxemu) if branching else contextlib.nullcontext():
                super().__call__(*launch)

    class GPU(gpu.EmulatedGPU):
        def __enter__(self):
            self.launcher_cls, self.launched = Launcher, {}
            knobs.runtime.add_stages_inspection_hook = _without_assembler
            return super().__enter__()

        def __exit__(self, *error):
            knobs.runtime.add_stages_inspection_hook = None
            super().__exit__(*error)
    return GPU


def _spelled_out(ptx: str) -> str:
    """A conversion that reads half of a 64-bit register, which PTX allows, in two steps that the executor knows."""
    return re.sub(r"^\s*cvt\.s64\.s32\s+(%rd\d+), (%rd\d+);",
                  r"{ .reg .b32 %half; cvt.u32.u64 %half, \2; cvt.s64.s32 \1, %half; }", ptx, flags=re.MULTILINE)


def _without_assembler(*compiling) -> tuple[str, str] | None:
    """A hook of Triton's compiler: what runs is the PTX. Without arguments: its part of the key of compiled kernels."""
    if not compiling:
        return "no assembler", "no assembler"
    compiling[1]["cubin"] = lambda source, metadata: b""


@contextlib.contextmanager
def as_on(arch: str, hopper: bool = False):
    """The pack takes CPU tensors for those of a GPU of this architecture; with `hopper`, as if its user had asked for
    that kernel."""
    verdict = SimpleNamespace(usable=True, reason="", pooled=True)
    changed = {"architecture": lambda device: arch, **dict.fromkeys(("triton_verdict", "hopper_verdict"),
                                                                     lambda device: verdict)}
    saved = [(module, name, getattr(module, name)) for key, module in list(sys.modules.items()) for name in changed
             if key.startswith("liteattention.kernels") and hasattr(module, name)]
    for module, name, _ in saved:
        setattr(module, name, changed[name])
    try:
        with mock.patch.dict(os.environ, LITEATTENTION_HOPPER=str(int(hopper))):
            yield
    finally:
        for module, name, was in saved:
            setattr(module, name, was)
