"""Differences between ComfyUI versions, each with the version that ends it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import comfy.model_management
import torch


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


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, or None where weights move out as soon as their room is needed (dynamic VRAM, from 0.22
    on): what is free there says nothing."""
    try:
        import comfy.memory_management as memory
    except ImportError:
        memory = None
    if device.type != "cpu" and getattr(memory, "aimdo_enabled", False):
        return None
    return int(comfy.model_management.get_free_memory(device))
