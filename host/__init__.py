"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach, run_handle
from .graph_checks import warn_of_second_copy, watch_prompts
from .progress import is_continued

__all__ = ["attach", "is_continued", "run_handle", "warn_of_second_copy", "watch_prompts"]
