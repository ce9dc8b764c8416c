"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach, run_handle
from .progress import is_continued

__all__ = ["attach", "is_continued", "run_handle"]
