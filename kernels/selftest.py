"""Run as a script in a child process: compile, launch and check one small call per kernel variant.

    python selftest.py cuda:0

Exits 0 if every result and mask agrees with the torch backend; says on its last line what did not.
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


def check(kernels, device: str) -> str | None:
    """None, or what differs between Triton and torch on `device`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for seqlen, head_dim in ((256, 128), (300, 64)):
        q, k, v = (torch.randn(1, 1, seqlen, head_dim, generator=generator).half() for _ in range(3))
        # Key tiles of unequal strength: with plain noise no tile is ever dropped and the masks prove nothing.
        q[..., 0] += 8
        k[..., 0] += torch.tensor([16.0, 0.0, 8.0])[torch.arange(seqlen) // 128].half()
        mask = kernels.SkipMask.full(1, 1, seqlen)
        outs = [kernels.lite_attention(q, k, v, mask, threshold=-4.0, record=record, backend="torch").float()
                for record in (True, False)]
        if not mask.words.ne(kernels.SkipMask.full(1, 1, seqlen).words).any():
            return "the self-test's own data dropped no tile"
        for name, options, tolerance in (("", {}, 1e-2), (" in INT8", {"int8": True}, 5e-2),
                                         (" when it skips at once", {"skip_now": True}, 1e-1)):
            ours, words = run_triton(kernels, (q, k, v), device, options)
            for a, b in zip(ours, outs, strict=True):
                error = (a - b).abs().max().item()
                if not error < tolerance:
                    return f"result differs by {error:.3g} at head_dim {head_dim}{name}"
            if not torch.equal(words, mask.words):
                return f"skip mask differs at head_dim {head_dim}{name}"
    return None


def run_triton(kernels, inputs: tuple, device: str, options: dict) -> tuple[list, object]:
    """Results of a recording and a reading call in float32, and the mask's words, on the CPU."""
    import torch
    from liteattention_selftest.precision import precision_choice
    from liteattention_selftest.triton_call import triton_attention

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
    problem = check(load_kernels(), sys.argv[1])
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
