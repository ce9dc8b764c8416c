"""Run as a script in a child process: compile, launch and check small calls of the kernels' forms.

    python selftest.py cuda:0

Exits 0 if every result and mask agrees with the torch backend; says on its last line what did not. Once all but the
stand-ins of skipped tiles have passed it says so on a line of its own (`BASIC`): a run can do without those.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


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


BASIC = "basic kernels passed"
"""Printed when only the stand-ins are left to check. `triton_probe` looks for it."""
FORMS = (  # what the last line calls it, dtype, options of the call, options of the launch, largest error
    ("", "float16", {}, {}, 1e-2),
    (" in INT8", "float16", {}, {"int8": True}, 1e-1),
    (" when it skips at once", "float16", {}, {"skip_now": True}, 1e-1),
    (" in bfloat16", "bfloat16", {}, {}, 5e-2),
    (" by mass", "float16", {"criterion": "mass"}, {"mass": True}, 1e-2),
)
STAND_IN_FORMS = (
    (" with stand-ins", "float16", {"pool_skipped": True}, {"pool_skipped": True}, 2e-2),
    (" with stand-ins by mass", "float16", {"pool_skipped": True, "criterion": "mass"}, {"pool_skipped": True, "mass": True},
     2e-2),
)


def check(kernels, device: str, forms: tuple) -> str | None:
    """None, or what differs between Triton and torch on `device`."""
    import torch

    for seqlen, head_dim in ((256, 128), (300, 64)):
        for name, dtype, options, launch, tolerance in forms:
            if dtype == "bfloat16" and device == "cpu":  # Triton's interpreter cannot
                continue
            inputs = make_inputs(seqlen, head_dim, options.get("pool_skipped", False))
            q, k, v = (x.to(getattr(torch, dtype)) for x in inputs)
            mask = kernels.SkipMask.full(1, 1, seqlen)
            outs = [kernels.lite_attention(q, k, v, mask, threshold=-4.0, record=record, backend="torch",
                                           **options).float() for record in (True, False)]
            if not mask.words.ne(kernels.SkipMask.full(1, 1, seqlen).words).any():
                return f"the self-test's own data dropped no tile{name}"
            ours, words = run_triton(kernels, (q, k, v), device, launch)
            for a, b in zip(ours, outs, strict=True):
                error = (a - b).abs().max().item()
                if not error < tolerance:
                    return f"result differs by {error:.3g} at head_dim {head_dim}{name}"
            if not torch.equal(words, mask.words):
                return f"skip mask differs at head_dim {head_dim}{name}"
    return None


def make_inputs(seqlen: int, head_dim: int, pool_skipped: bool) -> list:
    """q, k, v [1, 1, seqlen, head_dim], float32, whose key tiles differ in strength: of plain noise no tile is ever
    dropped, and the masks would prove nothing. For stand-ins the dropped tiles weigh something and differ in value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, seqlen, head_dim, generator=generator) for _ in range(3))
    tile = torch.arange(seqlen) // 128
    if pool_skipped:
        q, k = 0.1 * q, 0.1 * k
        v += torch.tensor([1.0, -2.0, 2.0])[tile, None]
    q[..., 0] += 8
    k[..., 0] += torch.tensor([16.0, 0.0, 8.0])[tile] * (0.25 if pool_skipped else 1)
    return [q, k, v]


def run_triton(kernels, inputs: tuple, device: str, options: dict) -> tuple[list, object]:
    """Results of a recording and a reading call in float32, and the mask's words, on the CPU."""
    import torch
    from liteattention_selftest.precision import precision_choice
    from liteattention_selftest.triton_launch import triton_attention

    q, k, v = (x.to(device) for x in inputs)
    seqlen, head_dim = q.shape[2:]
    if "int8" in options and precision_choice(q.device, head_dim, q.dtype, seqlen, "int8").name != "int8":
        options = {}
    mask = kernels.SkipMask.full(1, 1, seqlen, device=device)
    outs = []
    for recording in (True, False):
        out = torch.empty_like(q)
        triton_attention(q, k, v, out, None, [(mask, 0)], [False], -4.0, recording, None, head_dim ** -0.5,
                         kernels.Workspace(), None, **options)
        outs.append(out.float().cpu())
    return outs, mask.words.cpu()


if __name__ == "__main__":
    loaded = load_kernels()
    problem = check(loaded, sys.argv[1], FORMS)
    if not problem:
        print(BASIC, flush=True)
        problem = check(loaded, sys.argv[1], STAND_IN_FORMS)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
