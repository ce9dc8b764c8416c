"""Which tiles a run skips: the skip test of each call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..kernels import tiles
from .masks import LayerKey

BUDGET_MIN, BUDGET_MAX, BUDGET_DEFAULT = 0.01, 1.0, 0.3
THRESHOLD_MIN, THRESHOLD_MAX, THRESHOLD_DEFAULT = -30.0, 0.0, -10.0
THRESHOLD_STEP = 2.0
BUDGET_CROSSOVER, THRESHOLD_CROSSOVER = 0.3, -3.0
"""Beyond, a dense run of fewer steps can be closer to the dense video (docs/quality.md), and advice says so."""
_FEWER_STEPS = "; fewer steps can be closer to dense"


class SkipTest(NamedTuple):
    """Arguments of `lite_attention`: threshold in log2, and what it is compared with."""

    threshold: float
    criterion: str


class Rule(Protocol):
    """Chooses the skip test of a layer in a step."""

    @property
    def text(self) -> str:
        """Name of the input on the node and its value."""

    def skip_test(self, layer: LayerKey, step: int, seqlen_k: int) -> SkipTest:
        """The test of a call of `layer` over `seqlen_k` keys in `step`, counted from 0."""

    def bolder(self) -> str | None:
        """What to try to skip more, or None at the end of the range."""


@dataclass(frozen=True)
class ErrorBudget:
    """A token may lose at most this share of its attention when tiles are chosen; each key tile gets an equal part.

    With `pool_skipped` attention that pooled keys and values are estimated to carry is not lost. 1 drops tiles that
    hold less than an even share.

    Raises:
        ValueError: naming the input, its value and what is allowed.
    """

    share: float = BUDGET_DEFAULT

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not BUDGET_MIN <= share <= BUDGET_MAX:
            raise ValueError(f"error_budget is {share!r}; it is a share from {BUDGET_MIN:g} to {BUDGET_MAX:g}.")

    @property
    def text(self) -> str:
        return f"error_budget {self.share:g}"

    def skip_test(self, layer: LayerKey, step: int, seqlen_k: int) -> SkipTest:
        return SkipTest(math.log2(self.share / tiles(seqlen_k)), "mass")

    def bolder(self) -> str | None:
        beyond = _FEWER_STEPS if self.share >= BUDGET_CROSSOVER else ""
        return None if self.share >= BUDGET_MAX else (
            f"raise error_budget (now {self.share:g}) to skip more, and look at the video{beyond}")


@dataclass(frozen=True)
class Threshold:
    """The rule of the paper (arXiv 2511.11062, section 3): a tile goes once all its scores stay below `log2` of the
    strongest so far, e.g. -10 for 1/1024.

    Raises:
        ValueError: naming the input, its value and what is allowed.
    """

    log2: float = THRESHOLD_DEFAULT

    def __post_init__(self) -> None:
        value = self.log2
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
        if number and THRESHOLD_MIN <= value <= THRESHOLD_MAX:
            return
        hint = f" Did you mean {-value}?" if number and 0 < value <= -THRESHOLD_MIN else ""
        raise ValueError(f"threshold is {value}; it is a log2 value from {THRESHOLD_MIN:g} to {THRESHOLD_MAX:g}.{hint}")

    @property
    def text(self) -> str:
        return f"threshold {self.log2:g}"

    def skip_test(self, layer: LayerKey, step: int, seqlen_k: int) -> SkipTest:
        return SkipTest(self.log2, "max")

    def bolder(self) -> str | None:
        higher = min(THRESHOLD_MAX, self.log2 + THRESHOLD_STEP)
        beyond = _FEWER_STEPS if higher > THRESHOLD_CROSSOVER else ""
        return None if higher == self.log2 else (
            f"raise threshold to {higher:g} (now {self.log2:g}) to skip more, and look at the video{beyond}")
