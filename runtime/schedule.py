"""Which steps of a run are dense, which one records, and which are sparse."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FEW_STEPS = 8
"""Runs of up to so many steps (distilled models) warm up in one."""

NO_STEP_LEFT = "no step left to skip in"
RECORDS_ONLY = "records for the run that continues it"


class Phase(Enum):
    """What attention does during a step."""

    WARMUP = "warm-up"
    """Dense, by the fallback attention."""
    RECORD = "recording"
    """Every tile, by the sparse kernel, which records the first mask."""
    SPARSE = "sparse"
    """Read, skip, record."""
    END = "dense end"
    """Dense again, by the fallback attention."""


@dataclass(frozen=True)
class StepPlan:
    """Phases of a run of `total_steps` steps (the run's own steps: a KSamplerAdvanced from 4 to 8 has four).

    Warm-up takes at most a quarter of the run, in runs of few steps one step, and, unless 0 was asked for, at least
    one: distilled models would otherwise have little left to speed up. Its last step runs through the sparse kernel
    and records, so that no step is spent on recording alone. With 0 the first step records too, but a second evaluation
    inside it skips.

    Attributes:
        continued: another run goes on with the masks of this one, which records also where it has no step to skip in.
    """

    total_steps: int
    warmup_steps: int = 2
    dense_end_steps: int = 0
    continued: bool = False

    @property
    def dense_steps(self) -> int:
        """Steps at the start that compute every tile."""
        return min(self.warmup_steps, 1 if self.total_steps <= FEW_STEPS else self.total_steps // 4)

    @property
    def first_end_step(self) -> int:
        """The step from which the run is dense again."""
        return max(0, self.total_steps - self.dense_end_steps)

    @property
    def sparse_steps(self) -> int:
        """Steps that may skip. With warm-up 0 the first of them only records."""
        return max(0, self.first_end_step - self.dense_steps)

    @property
    def trial_steps(self) -> int:
        """Of the steps that may skip, those in which every layer is sparse, before dense attention may be faster."""
        return max(1, self.sparse_steps // 4)

    def phase(self, step: int) -> Phase:
        """The phase of `step`, counted from 0. Steps past the planned end keep the last phase."""
        if self.dense_end_steps and step >= self.first_end_step:
            return Phase.END
        if self.sparse_steps == 0 and step < self.dense_steps and not self.continued:
            return Phase.WARMUP
        if step < self.dense_steps - 1:
            return Phase.WARMUP
        if step == self.dense_steps - 1:
            return Phase.RECORD
        return Phase.SPARSE

    def describe(self, continues: bool = False) -> str:
        """What the settings mean for this run, e.g. "step 1 of 4 dense".

        Args:
            continues: the run took over masks of the run before, which need no warm-up.
        """
        parts = []
        if continues:
            parts.append(f"{self.total_steps} steps with the masks of the run before and without warm-up")
        elif self.dense_steps:
            parts.append(f"step 1 of {self.total_steps} dense" if self.dense_steps == 1
                         else f"steps 1-{self.dense_steps} of {self.total_steps} dense")
        else:
            parts.append(f"step 1 of {self.total_steps} records")
        if self.dense_end_steps:
            parts.append(f"from step {self.first_end_step + 1} dense again")
        if (self.first_end_step if continues else self.sparse_steps) == 0:
            records = any(self.phase(step) is Phase.RECORD for step in range(self.total_steps))
            parts.append(RECORDS_ONLY if records else NO_STEP_LEFT)
        return ", ".join(parts)
