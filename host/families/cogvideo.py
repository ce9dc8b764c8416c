"""CogVideoX: text first; 1.5 has patches of two frames."""

import torch

from .family import BlockHooks, Family, nothing


def patch(module: torch.nn.Module) -> tuple[int, int, int]:
    return module.patch_size_t or 1, module.patch_size, module.patch_size


FAMILIES = (
    Family("CogVideoX", ("CogVideoXTransformer3DModel",), "joint, in front", behind=nothing, patch=patch,
           numbering=BlockHooks((("double", "blocks"),))),
)
