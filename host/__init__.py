"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach, run_handle

__all__ = ["attach", "run_handle"]
