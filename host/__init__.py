"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach

__all__ = ["attach"]
