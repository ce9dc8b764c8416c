"""The settings of one patched model, validated once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..kernels import PRECISIONS
from .rules import ErrorBudget, Rule

STEPS_MAX = 100
TOKENS_MAX = 1_000_000

_BLOCK = re.compile(r"^(-?\d+)(?:-(-?\d+))?$")


@dataclass(frozen=True)
class LiteAttentionConfig:
    """Values as the node shows them.

    Attributes:
        rule: chooses the tiles that a run skips.
        warmup_steps: steps of the run that compute every tile; capped by `StepPlan`.
        dense_end_steps: last steps of the run that compute every tile again.
        dense_blocks: transformer blocks that stay dense, as in "0-1, 38, -1".
        min_tokens: shorter calls stay dense; 0 chooses by device.
        precision: "auto", "full" or "int8" (see `precision_choice`).
        pool_skipped: skipped tiles take part by their pooled keys and values (see `lite_attention`).

    Raises:
        ValueError: naming the input, its value and what is allowed.
    """

    rule: Rule = field(default_factory=ErrorBudget)
    warmup_steps: int = 2
    dense_end_steps: int = 0
    dense_blocks: str = ""
    min_tokens: int = 0
    precision: str = "auto"
    pool_skipped: bool = True

    def __post_init__(self) -> None:
        for name, high in (("warmup_steps", STEPS_MAX), ("dense_end_steps", STEPS_MAX), ("min_tokens", TOKENS_MAX)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                raise ValueError(f"{name} is {value!r}; it is a whole number from 0 to {high}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}.")
        if not isinstance(self.pool_skipped, bool):
            raise ValueError(f"pool_skipped is {self.pool_skipped!r}; allowed: True, False.")
        parse_blocks(self.dense_blocks)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {"rule": self.rule.text, "warmup_steps": self.warmup_steps, "dense_end_steps": self.dense_end_steps,
                "dense_blocks": self.dense_blocks, "min_tokens": self.min_tokens, "precision": self.precision,
                "pool_skipped": self.pool_skipped}


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
