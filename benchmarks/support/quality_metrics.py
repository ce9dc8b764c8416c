"""Figures of the quality lab: how alike two clips are, and what a curve says between its points."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
"""Pixels and standard deviation of SSIM's gaussian window (Wang, Bovik, Sheikh, Simoncelli 2004, section III)."""
STABILISERS = (0.01 ** 2, 0.03 ** 2)
"""C1 and C2 for pictures in 0..1."""


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two clips [T, H, W, C] in 0..1: each frame and colour by itself, windows that lie
    inside the picture. 1 where they are equal.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
    """
    x, y = (t.double().permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1) for t in (a, b))
    size = min(WINDOW, *x.shape[2:])
    at = torch.arange(size, dtype=torch.float64, device=x.device) - (size - 1) / 2
    line = torch.exp(-at.square() / (2 * SIGMA ** 2))
    line = line / line.sum()

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = STABILISERS
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean().item()


def interpolate(points: list[tuple[float, float]], at: float) -> float | None:
    """y of the polyline through (x, y) points at x = `at`; None outside their range. Of points with equal x the
    highest y counts."""
    best: dict[float, float] = {}
    for x, y in points:
        best[x] = max(y, best.get(x, -math.inf))
    line = sorted(best.items())
    if not line or not line[0][0] <= at <= line[-1][0]:
        return None
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return line[0][1]
