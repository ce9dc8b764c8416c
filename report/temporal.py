"""How alike the motion of two clips is: single frames can agree where movement does not."""

from __future__ import annotations

import math

from torch import Tensor

QUIET = 0.25
"""Share of the picture that moves least in the dense clip."""


def motion(dense: Tensor, lite: Tensor) -> dict:
    """Temporal error of `lite` against `dense`, both [T, H, W, C] in 0..1.

    Returns:
        motion_psnr_db: PSNR of the differences between neighbouring frames; None where they are equal or where there
            is one frame. quiet_motion: mean absolute difference between neighbouring frames over the quarter of the
            pixels that moves least in the dense clip, relative to the dense clip's: 0.1 is a tenth more. Noise of any
            kind raises it. None where nothing moves there.
    """
    steps = [clip.double().diff(dim=0) for clip in (dense, lite)]
    if not steps[0].numel():
        return {"motion_psnr_db": None, "quiet_motion": None}
    error = float((steps[0] - steps[1]).square().mean())
    still, now = (step.abs().mean((0, 3)).flatten() for step in steps)
    quiet = still.argsort()[:max(1, round(QUIET * still.numel()))]
    before, after = float(still[quiet].mean()), float(now[quiet].mean())
    return {"motion_psnr_db": -10 * math.log10(error) if error else None,
            "quiet_motion": after / before - 1 if before else None}
