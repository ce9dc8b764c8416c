"""The forms of the kernels that this pack launches, and how each is compiled for a GPU that is not here.

The launcher itself is called, with small tensors on the CPU and a driver that launches nothing, so what is compiled is
what a call there would run, specialisations included; no signature is described a second time.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx1100", "gfx1201")

SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
                "gfx942": 64, "gfx1100": 64, "gfx1201": 64}
"""KiB of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities; AMD: LDS
of one workgroup)."""

ATTENTION_FORMS = ("dense", "read", "record", "branch", "mass")
"""No mask; a mask that is read; recording; recording that leaves out at once what it drops; recording by mass."""

_LONG = 16384
"""Tokens from which the launcher does not sort rows by cost."""


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched for one kind of call.

    Attributes:
        form: one of ATTENTION_FORMS for the attention kernel; otherwise "expand" or "expand record" (mask bits to tile
            lists), "quantize" or "channel sum" (INT8 copies), "summary" (stand-ins).
        dtype: "bf16", "fp16" or "fp32", of q, k, v.
        ragged: the number of keys is no multiple of 128, so there is a second loop for the last tile.
        ordered: rows by cost, as in calls of less than 16384 tokens.
        pool_skipped: skipped tiles are represented.
    """

    arch: str
    form: str
    head_dim: int = 128
    dtype: str = "bf16"
    int8: bool = False
    ragged: bool = True
    ordered: bool = False
    pool_skipped: bool = False

    @property
    def name(self) -> str:
        """"sm_90 record d128 bf16 int8 even ordered"."""
        words = [self.arch, self.form]
        if self.attention:
            words += [f"d{self.head_dim}", self.dtype, *(["int8"] if self.int8 else []),
                      "ragged" if self.ragged else "even", *(["ordered"] if self.ordered else []),
                      *(["stand-in"] if self.pool_skipped else [])]
        return " ".join(words)

    @property
    def attention(self) -> bool:
        """Whether it is the attention kernel."""
        return self.form in ATTENTION_FORMS

    @property
    def recording(self) -> bool:
        """Whether the call writes into its mask."""
        return self.form in ("record", "branch", "mass", "expand record")

    @property
    def reads_only(self) -> bool:
        """Whether it has no business with atomics or reductions in global memory."""
        return self.attention and not self.recording


def variants(arch: str) -> list[Variant]:
    """What is checked for one architecture: every form at D = 128, the others where they change the machine code."""
    from liteattention.kernels.launch_table import CallKind, table_config

    found = [Variant(arch, form) for form in ("dense", "read", "record", "mass")]
    if table_config(_kind(CallKind, Variant(arch, "branch"))).branch:
        found.append(Variant(arch, "branch"))
    found += [Variant(arch, form, ragged=False) for form in ("read", "record")]
    found += [Variant(arch, form, head_dim) for head_dim in (64, 96) for form in ("read", "record")]
    found += [Variant(arch, "read", ordered=True), Variant(arch, "read", dtype="fp16"),
              Variant(arch, "read", dtype="fp32")]
    # As `precision_choice` decides; INT8 instructions are legacy on sm_100.
    if arch in NVIDIA and arch != "sm_100":
        found += [Variant(arch, form, int8=True) for form in ("read", "record")]
        found += [Variant(arch, "mass", int8=True, pool_skipped=True), Variant(arch, "read", 64, int8=True)]
        found += [Variant(arch, "quantize"), Variant(arch, "channel sum")]
    found += [Variant(arch, form, pool_skipped=True) for form in ("read", "record", "mass")]
    found += [Variant(arch, "mass", 96, pool_skipped=True), Variant(arch, "mass", dtype="fp32", pool_skipped=True)]
    return [*found, Variant(arch, "summary"), Variant(arch, "expand"), Variant(arch, "expand record")]


def gate_variants() -> list[Variant]:
    """What the tests compile at every push; the command compiles them all.

    Every architecture's reader and recorder, INT8 wherever it is shipped, and on one GPU of each kind (mma.sync,
    wgmma) what else has machine code of its own. sm_80 and sm_86 differ from sm_89 in little but INT8.
    """
    found = [Variant(arch, form) for arch in NVIDIA for form in ("read", "record")]
    found += [Variant(arch, "record", int8=True) for arch in NVIDIA if arch != "sm_100"]
    for arch in ("sm_89", "sm_90"):
        found += [Variant(arch, "branch"), Variant(arch, "record", 96), Variant(arch, "read", dtype="fp32"),
                  Variant(arch, "read", ragged=False), Variant(arch, "read", ordered=True),
                  Variant(arch, "read", pool_skipped=True), Variant(arch, "mass", pool_skipped=True)]
    return [*found, Variant("sm_90", "dense"), Variant("sm_90", "mass"), Variant("sm_90", "record", 64),
            Variant("sm_100", "read", dtype="fp32"), Variant("sm_120", "branch"),
            Variant("sm_89", "quantize"), Variant("sm_89", "expand record")]


def amd_gate_variants() -> list[Variant]:
    """What the tests compile for AMD, whose passes over pointers NVIDIA's compiler does not have. Not pinned."""
    return [Variant(arch, form, pool_skipped=form == "mass") for arch in AMD for form in ("record", "mass", "summary")]


def config_of(variant: Variant):
    """The `LaunchConfig` of the shipped table for this variant; tuned and overridden ones are not looked at."""
    from liteattention.kernels.launch_table import CallKind, table_config

    return table_config(_kind(CallKind, variant))


def compile_variant(variant: Variant, config=None):
    """The compiled kernel (`triton.compiler.CompiledKernel`) and what the assembler said while it made it.

    Args:
        config: instead of the shipped table's.
    """
    import triton
    from offline_gpu import OfflineGPU

    from liteattention.kernels import triton_attention, triton_int8, triton_pooled, triton_tile_lists

    kernel = {"summary": triton_pooled.summary_kernel,
              "quantize": triton_int8.quantize_kernel, "channel sum": triton_int8.channel_sum_kernel,
              "expand": triton_tile_lists.expand_kernel, "expand record": triton_tile_lists.expand_kernel}.get(
                  variant.form, triton_attention.attention_kernel)
    said = _Messages()
    # A cache of its own: what another version of the kernel left in the user's must not stand in for this one.
    with OfflineGPU(variant.arch) as gpu, _as_on(variant.arch), triton.knobs.nvidia.scope(), \
            triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.cache.dir = folder
        for each in (kernel, triton_tile_lists.expand_kernel, triton_attention.attention_kernel):
            each.device_caches.clear()
        with contextlib.redirect_stdout(said):
            _call(variant, config or config_of(variant))
        (compiled,) = gpu.compiled(kernel)
    return compiled, said.about(compiled.metadata.name)


class _Messages(io.StringIO):
    """Standard output, by print: Triton prints the assembler's messages once for each kernel."""

    def __init__(self):
        super().__init__()
        self._printed: list[str] = []

    def write(self, text: str) -> int:
        self._printed.append(text)
        return len(text)

    def about(self, kernel: str) -> str:
        """What was printed about the kernel of this name."""
        return "".join(text for text in self._printed if f"entry function '{kernel}'" in text)


def _kind(call_kind, variant: Variant):
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[variant.dtype]
    return call_kind(variant.arch, variant.head_dim, dtype, variant.recording,
                     variant.int8 or variant.form in ("quantize", "channel sum"))


@contextlib.contextmanager
def _as_on(arch: str) -> Iterator[None]:
    """The launcher takes its tensors' device for a GPU of this architecture."""
    from liteattention.kernels import triton_launch

    before, triton_launch.architecture = triton_launch.architecture, lambda device: arch
    try:
        yield
    finally:
        triton_launch.architecture = before


def _call(variant: Variant, config) -> None:
    """One call of the launcher. Nothing is computed, so the tensors' contents are whatever the memory held."""
    import torch

    from liteattention.kernels import SkipMask, Workspace, triton_launch
    from liteattention.kernels.launch_table import CallKind

    kind = _kind(CallKind, variant)
    tokens = (1024 if variant.ordered else _LONG) + (64 if variant.ragged else 0)
    # [B, N, H, D] memory seen as [B, H, N, D], as models hand q, k, v over; two heads, so that no stride is 1.
    q, k, v, out = (torch.empty(1, tokens, 2, variant.head_dim, dtype=kind.dtype).transpose(1, 2) for _ in range(4))
    rows = None if variant.form == "dense" else [(SkipMask.full(1, 2, tokens), 0)]
    triton_launch.triton_attention(
        q, k, v, out, None, rows, None if rows is None else [False], -10.0, kind.recording, None,
        variant.head_dim ** -0.5, Workspace(), None, mass=variant.form == "mass", int8=kind.int8,
        skip_now=variant.form == "branch", pool_skipped=variant.pool_skipped or variant.form == "summary", config=config)
