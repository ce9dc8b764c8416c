"""What outlives one attention call: settings, schedule, skip masks and statistics of a sampling run. No ComfyUI."""

from .call import AttentionCall
from .config import LiteAttentionConfig, parse_blocks
from .dispatch import BreakEvens
from .evaluation import Evaluation, LayerId
from .kept import KeptMasks, RowName
from .schedule import Phase, StepPlan
from .session import RunHandle, Session
from .statistics import Receipt, StepReport

__all__ = ["AttentionCall", "BreakEvens", "Evaluation", "KeptMasks", "LayerId", "LiteAttentionConfig", "Phase",
           "Receipt", "RowName", "RunHandle", "Session", "StepPlan", "StepReport", "parse_blocks"]
