"""Run as a script in a child process: compile, launch and check small calls of every form near the node's defaults.

    python selftest.py cuda:0 [plain | hopper]

Exits 0 if every result and mask agrees with the torch backend; says on its last line what did not. "plain" does without
pooled keys, as a run can, too; "hopper" checks the kernel for Hopper, in the forms that it takes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

THRESHOLD = -2.0


def load_kernels():
    """This folder as a package under a private name, without its parent (which needs ComfyUI)."""
    folder = Path(__file__).resolve().parent
    # As a script this folder leads sys.path, where its module names could hide others.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != folder]
    spec = importlib.util.spec_from_file_location("liteattention_selftest", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def checked_forms(kernels, device: str, plain: bool, hopper: bool = False) -> list:
    """What a run on `device` can launch, from `forms`; "plain": without pooled keys, "hopper": what that kernel takes.
    """
    import torch

    forms, launch_table = (importlib.import_module(f".{name}", kernels.__name__) for name in ("forms", "launch_table"))
    found = forms.near_defaults(launch_table.architecture(torch.device(device)))
    if device == "cpu":  # Triton's interpreter cannot multiply bfloat16
        found = [replace(form, dtype=torch.float16) if form.dtype == torch.bfloat16 else form for form in found]
    if hopper:
        found = [x for x in found if launch_table.serves_hopper("sm_90", x.head_dim, x.dtype, x.int8)]
    return list(dict.fromkeys(replace(form, pool_skipped=form.pool_skipped and not plain) for form in found))


def check(kernels, device: str, forms: list, hopper: bool = False) -> str | None:
    """None, or what differs between Triton and torch on `device`."""
    import torch

    with_lse = next(form for form in forms if not form.int8)
    for form in forms:
        tolerance = 1e-1 if form.int8 else {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-3}[form.dtype]
        # Several heads and batch entries, but for the interpreter, to which each costs as much as the first.
        inputs = make_inputs(1 if device == "cpu" else 2, 300 if form.ragged else 384, form.head_dim, form.dtype)
        expected, expected_words = run(kernels, "torch", inputs, "cpu", form, form == with_lse, hopper)
        if not (expected_words == 0b011).any():
            return f"the self-test's own data dropped no tile: {form.name}"
        results, words = run(kernels, "triton", inputs, device, form, form == with_lse, hopper)
        for a, b in zip(results, expected, strict=True):
            error = (a - b).abs().max().item()
            if not error < tolerance:
                return f"result differs by {error:.3g}: {form.name}"
        if not torch.equal(words, expected_words):
            return f"skip mask differs: {form.name}"
    return None


def make_inputs(entries: int, seqlen: int, head_dim: int, dtype) -> list:
    """q, k, v [entries, entries, seqlen, head_dim] whose key tiles differ in strength: of plain noise no tile is ever
    dropped, and the masks would prove nothing. Values go with keys and differ between tiles, or pooling would prove
    nothing."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(entries, seqlen, entries, head_dim, generator=generator) for _ in range(3))
    tile = torch.arange(seqlen) // 128
    q, k = 0.1 * q, 0.1 * k
    q[..., 0] += math.sqrt(head_dim)
    k[..., 0] *= 3
    v += torch.tensor([1.0, -2.0, 2.0])[tile, None, None] + 10 * k[..., :1]
    k[..., 0] += math.log(2) * torch.tensor([0.0, -7.5, -4.5])[tile, None]
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)]


def run(kernels, backend: str, inputs: list, device: str, form, with_lse: bool,
        hopper: bool = False) -> tuple[list, object]:
    """Results of two recording calls in float32, and the mask's words, on the CPU; with `hopper` also those of a call
    that only reads, which is another form there."""
    import torch

    q, k, v = (x.to(device) for x in inputs)
    batch, heads, seqlen, head_dim = q.shape
    mask = kernels.SkipMask.full(batch, heads, seqlen, device=device)
    results = []
    options = {"mass": form.criterion == "mass", "pool_skipped": form.pool_skipped}
    if backend == "triton":
        options.update(int8=form.int8, hopper=hopper)
        attention = importlib.import_module(".triton_launch", kernels.__name__).triton_attention
    else:
        attention = importlib.import_module(".torch_attention", kernels.__name__).torch_attention
    for backwards, recording in ((False, True), (True, True), *[(False, False)] * hopper):
        out = torch.empty_like(q)
        lse = torch.empty(batch, heads, seqlen, device=device) if with_lse else None
        attention(q, k, v, out, lse, [(mask, entry) for entry in range(batch)], [backwards] * batch, THRESHOLD,
                  recording, kernels.MustKeep(queries=((0, 1),)), head_dim ** -0.5, kernels.Workspace(), None,
                  **options)
        results += [x.float().cpu() for x in (out, lse) if x is not None]
    return results, mask.words.cpu()


if __name__ == "__main__":
    loaded = load_kernels()
    hopper = "hopper" in sys.argv[2:]
    checked = checked_forms(loaded, sys.argv[1], plain="plain" in sys.argv[2:], hopper=hopper)
    problem = check(loaded, sys.argv[1], checked, hopper)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
