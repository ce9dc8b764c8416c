"""What outlives one attention call: settings, schedule, skip masks and statistics of a sampling run. No ComfyUI."""

from ..kernels import triton_package
from .calibration import CalibrationSession, CalibrationTarget, ProfileHandle
from .call import AttentionCall
from .config import LiteAttentionConfig, parse_blocks
from .dispatch import BreakEvens
from .evaluation import Evaluation, LayerId
from .kept import KeptMasks, RowName
from .profile import Profile, ProfileError
from .receipt import Receipt, StepReport
from .savings import Saved
from .schedule import Phase, StepPlan
from .session import RunHandle, Session
from .snapshot import MaskChoice, MaskPicture

__all__ = ["AttentionCall", "BreakEvens", "CalibrationSession", "CalibrationTarget", "Evaluation", "KeptMasks",
           "LayerId", "LiteAttentionConfig", "MaskChoice", "MaskPicture", "Phase", "Profile", "ProfileError",
           "ProfileHandle", "Receipt", "RowName", "RunHandle", "Saved", "Session", "StepPlan", "StepReport",
           "parse_blocks", "triton_package"]
