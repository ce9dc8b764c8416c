"""Differences between ComfyUI versions, each with the version that ends it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


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
