"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach, run_handle
from .profiles import ProfiledRuns
from .prompt import continues, wanted_masks

__all__ = ["ProfiledRuns", "attach", "continues", "run_handle", "wanted_masks"]
