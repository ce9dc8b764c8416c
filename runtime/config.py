"""The settings of one patched model, validated once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..kernels import PRECISIONS, tiles

THRESHOLD_MIN, THRESHOLD_MAX, THRESHOLD_DEFAULT = -30.0, 0.0, -10.0
STEPS_MAX = 100
STATE_MB_MIN, STATE_MB_MAX, STATE_MB_DEFAULT = 16, 65536, 512
TOKENS_MAX = 1_000_000
BUDGET_MAX = 1.0
REFRESH_MAX = 64

_BLOCK = re.compile(r"^(-?\d+)(?:-(-?\d+))?$")


@dataclass(frozen=True)
class LiteAttentionConfig:
    """Values as the node shows them.

    Attributes:
        threshold: log2, -30..0 (see `lite_attention`).
        warmup_steps: steps of the run that compute every tile; capped by `StepPlan`.
        dense_end_steps: last steps of the run that go to the previous attention.
        dense_blocks: transformer blocks that stay dense, as in "0-1, 38, -1".
        min_tokens: shorter calls stay dense; 0 chooses by device.
        max_state_mb: most memory (MB of 2^20 bytes) that skip masks may take.
        log_details: also log the receipt as JSON and time attention (which synchronises on a GPU).
        precision: "auto", "full" or "int8" (see `precision_choice`).
        never_slower: layers that stay too dense to gain go to the previous attention.
        error_budget: above 0 it replaces `threshold`: the largest share of its attention (with `pool_skipped`: of what is
            at stake of it) that a token may lose when tiles are chosen, 0..1. Each key tile gets an equal part;
            1 drops tiles that hold less than an even share.
        refresh_every: 0 = never; at each evaluation of a sparse step 1 of so many query tiles is judged anew.
        pool_skipped: skipped tiles are represented by their means and do not vanish (see `lite_attention`).

    Raises:
        ValueError: naming the input, its value and what is allowed.
    """

    threshold: float = THRESHOLD_DEFAULT
    warmup_steps: int = 2
    dense_end_steps: int = 0
    dense_blocks: str = ""
    min_tokens: int = 0
    max_state_mb: int = STATE_MB_DEFAULT
    log_details: bool = False
    precision: str = "auto"
    never_slower: bool = True
    error_budget: float = 0.0
    refresh_every: int = 0
    pool_skipped: bool = True

    def __post_init__(self) -> None:
        problem = threshold_problem(self.threshold)
        if problem:
            raise ValueError(problem)
        for name, low, high in (("warmup_steps", 0, STEPS_MAX), ("dense_end_steps", 0, STEPS_MAX),
                                ("min_tokens", 0, TOKENS_MAX), ("max_state_mb", STATE_MB_MIN, STATE_MB_MAX),
                                ("refresh_every", 0, REFRESH_MAX)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; it is a whole number from {low} to {high}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}.")
        for name in ("never_slower", "pool_skipped"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True, False.")
        budget = self.error_budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= BUDGET_MAX:
            raise ValueError(f"error_budget is {budget!r}; it is a share from 0 (off) to {BUDGET_MAX:g}.")
        parse_blocks(self.dense_blocks)

    @property
    def criterion(self) -> str:
        """The skip test (see `lite_attention`)."""
        return "mass" if self.error_budget else "max"

    def call_threshold(self, seqlen_k: int) -> float:
        """The threshold (log2) of a call over so many keys."""
        return math.log2(self.error_budget / tiles(seqlen_k)) if self.error_budget else self.threshold

    @property
    def rule(self) -> str:
        """Which rule chooses the tiles, for people."""
        return f"error_budget {self.error_budget:g} (threshold unused)" if self.error_budget \
            else f"threshold {self.threshold:g}"


def threshold_problem(value: float) -> str | None:
    """None, or the sentence that says why `value` is no threshold."""
    if isinstance(value, (int, float)) and not math.isnan(value) and THRESHOLD_MIN <= value <= THRESHOLD_MAX:
        return None
    hint = f" Did you mean {-value}?" if isinstance(value, (int, float)) and 0 < value <= -THRESHOLD_MIN else ""
    return f"threshold is {value}; it is a log2 value from {THRESHOLD_MIN:g} to {THRESHOLD_MAX:g}.{hint}"


@dataclass(frozen=True)
class BlockSet:
    """Blocks named by the user; a range with a negative end can be resolved only once the model's count is known."""

    ranges: tuple[tuple[int, int], ...] = ()

    def holds(self, index: int, total: int | None) -> bool:
        """Whether block `index` of `total` is in the set. Unknown total: negative numbers match nothing."""
        for start, stop in self.ranges:
            if total is None and (start < 0 or stop < 0):
                continue
            first, last = (x + total if x < 0 else x for x in (start, stop))
            if first <= index <= last:
                return True
        return False


def parse_blocks(text: str) -> BlockSet:
    """Parse "0-1, 38, -1": numbers and ranges between commas or spaces; a negative number counts from the end.

    Raises:
        ValueError: naming the part that is neither, or a range that runs backwards.
    """
    ranges = []
    for part in re.split(r"[,\s]+", text.strip()) if text.strip() else []:
        found = _BLOCK.match(part)
        if not part:
            continue
        if not found:
            raise ValueError(f'dense_blocks is "{text}": "{part}" is not a block number or range. Write numbers and '
                             'ranges between commas, as in "0-1, 38, -1" (-1 is the last block).')
        start = int(found.group(1))
        stop = int(found.group(2)) if found.group(2) is not None else start
        if (start < 0) == (stop < 0) and stop < start:
            raise ValueError(f'dense_blocks is "{text}": the range "{part}" runs backwards. Write {stop}-{start}.')
        ranges.append((start, stop))
    return BlockSet(tuple(ranges))
