"""The bridge to ComfyUI: the only folder that imports comfy."""

from .attach import attach, run_handle
from .graph_checks import warn_of_second_copy, watch_prompts
from .language import language
from .progress import is_continued

__all__ = ["attach", "is_continued", "language", "run_handle", "warn_of_second_copy", "watch_prompts"]
