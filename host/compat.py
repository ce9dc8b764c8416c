"""Differences between ComfyUI versions, each with the version that ends it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import comfy.ldm.modules.attention as attention
import torch

_NAMES = {
    "attention_pytorch": "PyTorch's attention", "attention_sub_quad": "ComfyUI's sub-quadratic attention",
    "attention_split": "ComfyUI's split attention", "attention_xformers": "xFormers", "attention_sage": "SageAttention",
    "attention3_sage": "SageAttention 3", "attention_flash": "FlashAttention",
    "attention_comfy_kitchen_int8": "ComfyUI's INT8 attention",
}
"""Display names of ComfyUI's own attentions."""


def allocation_guard() -> AbstractContextManager:
    """To hold around allocations that outlive a transformer block.

    From 0.34 on ComfyUI may record a block's allocations and replay them; memory that stays has to be kept out
    of the recording. Older versions have no recorder.
    """
    try:
        import comfy.model_prefetch as prefetch
    except ImportError:
        return nullcontext()
    pause = getattr(prefetch, "pause_malloc_graph", None)
    return pause() if pause is not None else nullcontext()


def attention_name(override: Callable | None) -> str:
    """Display name, without a path, of the fallback attention: ComfyUI's own function, or the override found on a model
    and the pack that it comes from."""
    if override is None:
        return _name(attention.optimized_attention)
    # The override of *Model Attention Backend* has the same name for every backend.
    captured = getattr(getattr(override, "__code__", None), "co_freevars", ())
    if "optimized_attention" in captured:
        return _name(override.__closure__[captured.index("optimized_attention")].cell_contents)
    module = str(getattr(override, "__module__", None) or "")
    folder, _, file = module.replace("\\", "/").rpartition("/")  # modules of custom nodes are named by their path
    return f"{_name(override)} of {file.split('.')[0] if folder else module}" if module else _name(override)


def _name(function: Callable) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return _NAMES.get(name, name)


def faster_dense(override: Callable | None, device: torch.device) -> str:
    """Advice where PyTorch's attention computes dense calls and ComfyUI has a faster one (INT8, from 0.33 on), else "".
    The pack does not switch it on, because it changes the video."""
    if (override is None and device.type == "cuda" and attention.optimized_attention is attention.attention_pytorch
            and getattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", False)):
        return ("for dense calls, Model Attention Backend with comfy kitchen attention before LiteAttention "
                "(INT8, changes the video a little)")
    return ""
