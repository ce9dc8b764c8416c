"""Cosmos Predict2: before ComfyUI 0.33 it does not number its blocks."""

import torch

from .family import BlockHooks, Family, nothing


def patch(module: torch.nn.Module) -> tuple[int, int, int]:
    return module.patch_temporal, module.patch_spatial, module.patch_spatial


FAMILIES = (
    Family("Cosmos Predict2", ("MiniTrainDIT",), "cross-attention", front=nothing, patch=patch,
           numbering=BlockHooks((("block", "blocks"),))),
)
