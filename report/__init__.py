"""Pictures and texts about runs: plain values and tensors in, images out. Imports no other layer."""

from .comparison import compare_clips
from .mask_pictures import MaskPicture, mask_pictures
from .run_report import draw_run

__all__ = ["MaskPicture", "compare_clips", "draw_run", "mask_pictures"]
