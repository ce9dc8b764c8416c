"""Pictures and texts about runs: plain values and tensors in, images out. Imports no other layer."""

from .comparison import compare_clips
from .run_report import MaskPanel, draw_run, run_summary

__all__ = ["MaskPanel", "compare_clips", "draw_run", "run_summary"]
