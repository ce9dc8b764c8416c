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
        results = {}
        for backend in ("triton", "torch"):
            place = device if backend == "triton" else "cpu"
            mask = kernels.SkipMask.full(1, 1, seqlen, device=place)
            inputs = [x.to(place) for x in (q, k, v)]
            if backend == "triton":
                from liteattention_selftest.triton_attention import triton_attention

                outs = []
                for recording in (True, False):
                    out = torch.empty_like(inputs[0])
                    triton_attention(*inputs, out, None, [(mask, 0)], [False], -4.0, recording, None,
                                     head_dim ** -0.5, kernels.Workspace(), None)
                    outs.append(out)
            else:
                outs = [kernels.lite_attention(*inputs, mask, threshold=-4.0, record=record, backend="torch")
                        for record in (True, False)]
            results[backend] = [x.float().cpu() for x in outs], mask.words.cpu()
        for ours, theirs in zip(results["triton"][0], results["torch"][0], strict=True):
            error = (ours - theirs).abs().max().item()
            if not error < 1e-2:
                return f"result differs by {error:.3g} at head_dim {head_dim}"
        if not torch.equal(results["triton"][1], results["torch"][1]):
            return f"skip mask differs at head_dim {head_dim}"
        if not results["torch"][1].ne(kernels.SkipMask.full(1, 1, seqlen).words).any():
            return "the self-test's own data dropped no tile"
    return None


if __name__ == "__main__":
    problem = check(load_kernels(), sys.argv[1])
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
