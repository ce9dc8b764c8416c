"""The kernels of each launchable form, and how each is compiled for a GPU that is not here.

The launcher itself is called, with small tensors on the CPU and a driver that launches nothing, so what is compiled is
what a call there would run, specialisations included; no signature is described a second time.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from liteattention.kernels import forms
from liteattention.kernels.forms import AMD, NVIDIA, Form

SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227,
                "sm_120": 99, "sm_121": 99, "gfx942": 64, "gfx1100": 64, "gfx1201": 64}
"""KiB of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities; AMD: LDS
of one workgroup)."""

DISASSEMBLED = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures that Triton's disassembler knows. For the others there is the assembler's report alone."""

KERNELS = {"attention": "attention_kernel", "tile lists": "tile_list_kernel", "pool": "pool_kernel",
           "pooled attention": "pooled_attention_kernel", "channel sum": "channel_sum_kernel",
           "balance": "balance_kernel", "quantize": "quantize_kernel"}
"""By what is printed: their names in `triton_launch`."""
HOPPER = {"hopper": "hopper_attention_kernel", "hopper reading": "hopper_attention_kernel", "pack": "pack_kernel"}
"""The same of those in `triton_hopper`."""

ONE_OF_EACH_KIND = ("sm_89", "sm_90")
"""mma.sync and wgmma. What deviates from the defaults is compiled at each push for these alone."""


@dataclass(frozen=True)
class Variant:
    """One kernel, a key of KERNELS or HOPPER, as it is launched for one form of call."""

    arch: str
    form: Form
    kernel: str = "attention"

    @property
    def name(self) -> str:
        """"sm_90 attention d128 bf16 int8 mass pooled even"."""
        return f"{self.arch} {self.kernel} {self.form.name}"


def variants(arch: str) -> list[Variant]:
    """What is pinned for one architecture: every kernel of default forms, the attention kernels of near ones."""
    near = [Variant(arch, form) for form in forms.near_defaults(arch)]
    return list(dict.fromkeys([*default_variants(arch), *near, *_hopper_variants(arch)]))


def _hopper_variants(arch: str) -> list[Variant]:
    """The kernel for Hopper in the forms near the defaults that it takes; and of the default one, what else it has."""
    from liteattention.kernels.launch_table import serves_hopper

    taken = [form for form in forms.near_defaults(arch) if serves_hopper(arch, form.head_dim, form.dtype, form.int8)]
    return [*(Variant(arch, form, "hopper") for form in taken),
            *(Variant(arch, form, kernel) for form in taken[:1] for kernel in ("hopper reading", "pack"))]


def default_variants(arch: str) -> list[Variant]:
    """Every kernel of the forms that the node's defaults launch."""
    found = []
    for form in forms.default_forms(arch):
        found += [Variant(arch, form), Variant(arch, form, "pooled attention")]
        if form.criterion == forms.CHOICES["criterion"][0]:
            found += [Variant(arch, form, kernel) for kernel in ("channel sum", "balance", "quantize") if form.int8]
            found += [Variant(arch, form, kernel) for kernel in ("tile lists", "pool") if not form.int8]
    # Of the forms in INT8 and without, these are the same.
    return [v for v in found if not (v.kernel == "pooled attention" and v.form.int8)]


def all_variants(arch: str) -> list[Variant]:
    """The attention kernel of every launchable form, and the kernels beside it."""
    return list(dict.fromkeys([*variants(arch), *(Variant(arch, form) for form in forms.launchable(arch))]))


def gate_variants() -> list[Variant]:
    """What the tests compile at every push; the command compiles all that are pinned."""
    return [v for arch in NVIDIA for v in (variants(arch) if arch in ONE_OF_EACH_KIND else default_variants(arch))]


def amd_gate_variants() -> list[Variant]:
    """What the tests compile for AMD, whose passes over pointers NVIDIA's compiler does not have. Not pinned."""
    return [v for arch in AMD for v in default_variants(arch) if v.kernel in ("attention", "pool", "pooled attention")]


def config_of(variant: Variant):
    """The `LaunchConfig` of the table for this variant."""
    from liteattention.kernels.launch_table import launch_config

    return launch_config(variant.arch, variant.form.head_dim, variant.form.dtype, variant.form.int8)


def compile_variant(variant: Variant, config=None):
    """The compiled kernel (`triton.compiler.CompiledKernel`) and what the assembler said while it made it.

    Args:
        config: instead of the table's.
    """
    import triton
    from offline_gpu import OfflineGPU

    kernel = getattr(*_kernels()[variant.kernel])
    said = _Messages()
    # A cache of its own: what another version of the kernel left in the user's must not stand in for this one.
    with OfflineGPU(variant.arch) as gpu, _only(kernel, variant.arch), triton.knobs.nvidia.scope(), \
            triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.cache.dir = folder
        kernel.device_caches.clear()
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


class _NotLaunched:
    """In place of a kernel that is not asked about."""

    def __getitem__(self, grid):
        return lambda **arguments: None


@contextlib.contextmanager
def _only(kernel, arch: str) -> Iterator[None]:
    """The launcher takes its tensors' device for a GPU of this architecture and launches one kernel alone."""
    from liteattention.kernels import triton_launch

    changed = {place: _NotLaunched() for place in _kernels().values() if getattr(*place) is not kernel}
    changed[triton_launch, "architecture"] = lambda device: arch
    before = {place: getattr(*place) for place in changed}
    for place, value in changed.items():
        setattr(*place, value)
    try:
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


def _kernels() -> dict[str, tuple]:
    """Module and name there of each kernel."""
    from liteattention.kernels import triton_launch

    places = {kernel: (triton_launch, name) for kernel, name in KERNELS.items()}
    with contextlib.suppress(ImportError):  # a Triton without Gluon, or with another
        from liteattention.kernels import triton_hopper

        places |= {kernel: (triton_hopper, name) for kernel, name in HOPPER.items()}
    return places


def _call(variant: Variant, config) -> None:
    """One call of the launcher. Nothing is computed, so the tensors' contents are whatever the memory held."""
    import torch

    from liteattention.kernels import SkipMask, Workspace, triton_launch

    form = variant.form
    tokens = 1024 + (64 if form.ragged else 0)
    # [B, N, H, D] memory seen as [B, H, N, D], as models hand q, k, v over; two heads, so that no stride is 1.
    q, k, v, out = (torch.empty(1, tokens, 2, form.head_dim, dtype=form.dtype).transpose(1, 2) for _ in range(4))
    triton_launch.triton_attention(
        q, k, v, out, None, [(SkipMask.full(1, 2, tokens), 0)], [False], -10.0,
        variant.kernel != "hopper reading", None, form.head_dim ** -0.5,
        Workspace(), torch.zeros(32, dtype=torch.int64), mass=form.criterion == "mass", int8=form.int8,
        pool_skipped=form.pool_skipped, config=config, hopper=variant.kernel in HOPPER)
