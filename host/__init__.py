"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach
from .prompt import continues

__all__ = ["attach", "continues"]
