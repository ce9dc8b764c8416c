"""What was tried to raise the quality at an equal share: methods of one run, made of simulated calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .quality_methods import Outcome, Rules, chunks, simulate

LOSS_BUDGETS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Of which "equal error" gives each head the boldest that keeps it within its error."""


class Simulated:
    """Every call after the warm-up by `simulate`, at one budget for all heads. What others change are its three parts.

    Args:
        budget: share of its attention that a row may lose. total: evaluations of the run.
    """

    rules = Rules()

    def __init__(self, budget: float, total: int):
        self.budget, self.total = budget, total
        self.keep: dict[int, Tensor] = {}
        self.levels: dict[int, Tensor] = {}

    def level(self, key_tiles: int, budget: float | None = None) -> float:
        return math.log2((budget or self.budget) / key_tiles)

    def choose_levels(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """log2 thresholds [B, H] of a layer, from its first recording pass."""
        return torch.full(q.shape[:2], self.level(-(-q.shape[2] // self.rules.key_tile)))

    def before(self, layer: int, evaluation: int) -> None:
        """Changes to a layer's mask before a call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, evaluation: int) -> Outcome:
        """q, k, v [B, H, N, D]; `evaluation` counts from the recording one."""
        if layer not in self.levels:
            self.levels[layer] = self.choose_levels(q, k, v)
        self.before(layer, evaluation)
        got = simulate(q, k, v, self.keep.get(layer), self.levels[layer], self.rules, evaluation % 2 == 1)
        self.keep[layer] = got.keep
        return got


class Part(Simulated):
    """The method without one of its parts, or with another rule."""

    def __init__(self, budget: float, total: int, **changes: object):
        super().__init__(budget, total)
        self.rules = replace(self.rules, **changes)


class ByUniformity(Simulated):
    """A head's budget times the `power` of its uniformity: exp(entropy) of the tiles' shares over their number, mean
    over rows. Above 0 sharp heads get less, below 0 more."""

    def __init__(self, budget: float, total: int, power: float):
        super().__init__(budget, total)
        self.power = power

    def choose_levels(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        uniformity = torch.zeros(q.shape[:2])
        for c in chunks(q, k, self.rules.tile, self.rules.key_tile):
            share = c.mass / c.mass.sum(-1, keepdim=True)
            effective = torch.special.entr(share).sum(-1).exp() / share.shape[1]
            uniformity[c.b, c.h] += effective[:c.rows.stop - c.rows.start].sum() / q.shape[2]
        return super().choose_levels(q, k, v) + self.power * uniformity.log2()


class EqualError(Simulated):
    """Each head gets the boldest of `LOSS_BUDGETS` at which its first mask changes its output by at most `budget`
    (relative L2)."""

    def choose_levels(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense = F.scaled_dot_product_attention(q, k, v)
        key_tiles = -(-q.shape[2] // self.rules.key_tile)
        chosen = torch.full(q.shape[:2], -math.inf)
        for budget in LOSS_BUDGETS:
            levels = torch.full(q.shape[:2], self.level(key_tiles, budget))
            keep = simulate(q, k, v, None, levels, self.rules).keep
            out = simulate(q, k, v, keep, torch.full_like(levels, -math.inf), self.rules).out
            error = (out - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
            chosen = torch.where((error <= self.budget) & chosen.isinf(), levels, chosen)
            if not chosen.isinf().any():
                break
        return chosen


class Rerecorded(Simulated):
    """Every mask starts anew halfway."""

    def before(self, layer: int, evaluation: int) -> None:
        if evaluation == self.total // 2:
            self.keep.pop(layer, None)


class RerecordedWhereMoved(Simulated):
    """Before half of the run an eighth of the query tiles is judged anew; a head where more than `share` of the tiles
    dropped there come back starts anew in the next evaluation."""

    def __init__(self, budget: float, total: int, share: float):
        super().__init__(budget, total)
        self.share = share
        self.moved: dict[int, Tensor] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, evaluation: int) -> Outcome:
        if evaluation == self.total // 2 - 1 and layer in self.keep:
            before = self.keep[layer]
            opened = before.clone()
            opened[:, :, ::8] = True
            got = simulate(q, k, v, opened, self.levels[layer], self.rules, evaluation % 2 == 1)
            dropped = ~before[:, :, ::8]
            back = (got.keep[:, :, ::8] & dropped).sum((2, 3)) / dropped.sum((2, 3)).clamp_min(1)
            self.moved[layer] = back > self.share
            self.keep[layer] = got.keep
            return got
        if evaluation == self.total // 2 and layer in self.moved:
            self.keep[layer] = self.keep[layer] | self.moved[layer][:, :, None, None]
        return super().attend(q, k, v, layer, evaluation)


BY_ERROR = "equal error by head"
CANDIDATES: dict[str, Callable[[float, int], Simulated]] = {
    "re-recorded at half": Rerecorded,
    BY_ERROR: EqualError,
    "budget or threshold": lambda budget, total: Part(budget, total, criterion="either", second=-5.0),
    "budget and threshold agree": lambda budget, total: Part(budget, total, criterion="both", second=-3.0),
    "re-recorded where moved": lambda budget, total: RerecordedWhereMoved(budget, total, 0.3),
    "pooled mass by variance": lambda budget, total: Part(budget, total, mass_cap=0.7),
    "key tiles of 64": lambda budget, total: Part(budget, total, key_tile=64),
    "budget x uniformity": lambda budget, total: ByUniformity(budget, total, 1.0),
    "budget / uniformity": lambda budget, total: ByUniformity(budget, total, -1.0),
}
PARTS: dict[str, Callable[[float, int], Simulated]] = {
    "without pooling": lambda budget, total: Part(budget, total, pool_skipped=False),
    "without covariance": lambda budget, total: Part(budget, total, covariance=False),
    "without weighting": lambda budget, total: Part(budget, total, weighted=False),
}
