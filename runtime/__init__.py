"""One sampling run: settings, schedule, skip masks, counters, summary. No ComfyUI."""

from ..kernels import triton_package
from .call import AttentionCall
from .config import LiteAttentionConfig, parse_blocks
from .forward import ForwardPass, LayerId
from .masks import CarriedMasks, RowName
from .reasons import Reason
from .rules import ErrorBudget, Rule, Threshold
from .run import RunHandle, SamplingRun
from .schedule import Phase, StepPlan
from .summary import RunSummary, StepReport
from .timing import BreakEvens, TimeSaved
from .video_tokens import VideoTokens
from .words import words

__all__ = ["AttentionCall", "BreakEvens", "CarriedMasks", "ErrorBudget", "ForwardPass", "LayerId",
           "LiteAttentionConfig", "Phase", "Reason", "RowName", "Rule", "RunHandle", "RunSummary", "SamplingRun",
           "StepPlan", "StepReport", "Threshold", "TimeSaved", "VideoTokens", "parse_blocks", "triton_package", "words"]
