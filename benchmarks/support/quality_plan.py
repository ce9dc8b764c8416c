"""Which settings the quality lab runs, on which cases, and in which order."""

from __future__ import annotations

import math
from dataclasses import replace

from .quality_methods import Setting
from .quality_runs import Case

KERNEL = {"kind": "kernel", "tile": 128}
LITE = Setting("LiteAttention, tiles of 64", 0.0, everywhere=True)
LITE_128 = Setting("LiteAttention, tiles of 128", 0.0, everywhere=True, **KERNEL)
SOL = Setting("Sol-Attn", 0.0, kind="sol", everywhere=True)
ORACLE = Setting("oracle", 0.0, kind="oracle", pool_skipped=False)
BUDGETS = (0.02, 0.05, 0.1, 0.3, 0.5, 1.0)
FEW = 8
"""Steps up to which the plan is that of distilled models."""
THRESHOLDS = (-14.0, -10.0, -6.0, -3.0)


def curve(setting: Setting, *levels: float, **changes: object) -> list[Setting]:
    """The setting at each level."""
    return [replace(setting, level=level, **changes) for level in levels]


def curves() -> list[Setting]:
    """Everything that runs, what matters most first. Levels are log2 thresholds, for Sol-Attn its tau."""
    alone = {"everywhere": False}
    return [
        *curve(SOL, -2.0, -1.2, -0.4, 0.4, 1.1, 1.8, 2.6),
        *curve(LITE, -8.0, -7.0, -6.0, -5.0, -4.0, -3.25, -2.5, -1.75),
        *curve(LITE_128, -6.0, -4.5, -3.5, -2.5, -1.75),
        *curve(replace(LITE_128, curve="max test, tiles of 128", criterion="max", pool_skipped=False),
               *THRESHOLDS, **alone),
        *curve(replace(LITE_128, curve="max + pooled, tiles of 128", criterion="max"), *THRESHOLDS, **alone),
        *curve(replace(LITE, curve="max + pooled", criterion="max"), -6.0, -3.5, **alone),
        *curve(replace(LITE, curve="no covariance", covariance=False), -6.0, -4.5, **alone),
        *curve(replace(LITE, curve="no weighting", weighted=False), -7.0, -5.5, **alone),
        *curve(replace(LITE, curve="mass test alone", pool_skipped=False), -7.0, -5.5, **alone),
        *curve(replace(ORACLE, curve="oracle + pooled", pool_skipped=True), -6.5, -5.0, **alone),
        *curve(replace(ORACLE, curve="oracle by residual", pool_skipped=True, criterion="residual"), -6.5, -5.0,
               **alone),
        *curve(ORACLE, -7.5, -6.0, **alone),
        *curve(replace(LITE, curve="cubes 1x8x8", cubes=(1, 8, 8)), -6.0, -4.5, **alone),
        *curve(replace(LITE, curve="cubes 2x8x8", cubes=(2, 8, 8)), -6.0, -4.5, **alone),
        *curve(replace(LITE, curve="refresh every 8", refresh=8), -5.5, -4.0, **alone),
        *curve(replace(LITE, curve="refresh every 16", refresh=16), -5.5, -4.0, **alone),
    ]


def few_steps(steps: int) -> list[Setting]:
    """Runs of distilled models' lengths: what warm-up costs, and what a second sampler that starts anew."""
    levels = (-6.0, -4.5, -3.5, -2.5)
    return [*curve(SOL, -1.2, -0.4, 0.4, 1.1, 1.8), *curve(LITE_128, *levels), *curve(LITE, *levels),
            *curve(replace(LITE_128, curve="warm-up 2, tiles of 128", warmup=2), *levels),
            *curve(replace(LITE_128, curve="two runs, tiles of 128", restart=steps // 2), *levels)]


def budgets(tokens: int) -> list[Setting]:
    """Error budgets on the pack's own kernels: the threshold of each is its share of the key tiles.

    Args:
        tokens: of the case they run on.
    """
    return [replace(LITE_128, curve=f"budget {budget:g}", everywhere=False,
                    level=math.log2(budget / math.ceil(tokens / LITE_128.tile))) for budget in BUDGETS]


def quick() -> list[Setting]:
    """One point of each kind, at levels that skip something of a small clip."""
    return [replace(SOL, level=0.5), replace(LITE, level=-2.0), replace(LITE_128, level=-1.0),
            replace(LITE, curve="cubes 1x8x8", cubes=(1, 8, 8), level=-2.0), replace(ORACLE, level=-2.0),
            replace(LITE, curve="refresh every 2", refresh=2, level=-2.0)]


def plan(cases: list[Case], settings: list[Setting]) -> list[tuple[Case, Setting]]:
    """Pairs to run, what matters most first: the compared curves on two cases, the others, further cases."""
    everywhere = [s for s in settings if s.everywhere]
    others = [s for s in settings if not s.everywhere]
    return [*((case, s) for case in cases[:2] for s in everywhere), *((cases[0], s) for s in others),
            *((case, s) for case in cases[2:] for s in everywhere)]
