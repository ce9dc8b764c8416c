"""Phases of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liteattention.runtime import Phase, StepPlan
from liteattention.runtime.schedule import FEW_STEPS

W, R, S, E = Phase.WARMUP, Phase.RECORD, Phase.SPARSE, Phase.END


@pytest.mark.parametrize("total, warmup, end, phases", [
    (4, 2, 0, [R, S, S, S]),
    (8, 2, 0, [R] + [S] * 7),
    (8, 100, 0, [R] + [S] * 7),
    (9, 2, 0, [W, R] + [S] * 7),
    (2, 2, 0, [R, S]),
    (20, 2, 0, [W, R] + [S] * 18),
    (20, 100, 0, [W] * 4 + [R] + [S] * 15),
    (3, 5, 0, [R, S, S]),
    (1, 2, 0, [W]),
    (6, 0, 0, [S] * 6),
    (6, 1, 2, [R, S, S, S, E, E]),
    (4, 1, 3, [W, E, E, E]),
    (4, 1, 9, [E] * 4),
])
def test_phases(total, warmup, end, phases):
    plan = StepPlan(total, warmup, end)
    assert [plan.phase(step) for step in range(total)] == phases


@given(st.integers(1, 200), st.integers(0, 100), st.integers(0, 100))
def test_warmup_is_at_most_a_quarter_and_at_least_one_unless_zero_was_asked(total, warmup, end):
    plan = StepPlan(total, warmup, end)
    assert plan.dense_steps <= (1 if total <= FEW_STEPS else total // 4)
    assert plan.dense_steps <= warmup
    assert (plan.dense_steps == 0) == (warmup == 0)
    phases = [plan.phase(step) for step in range(total)]
    assert phases.count(Phase.RECORD) <= 1
    assert phases.count(Phase.SPARSE) == plan.sparse_steps
    order = [Phase.WARMUP, Phase.RECORD, Phase.SPARSE, Phase.END]
    assert [order.index(p) for p in phases] == sorted(order.index(p) for p in phases)
    if plan.sparse_steps and warmup:
        assert Phase.RECORD in phases, "something has to record before a step can skip"


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_steps_past_the_plan_keep_the_last_phase(total, warmup, end):
    plan = StepPlan(total, warmup, end)
    if end:
        assert plan.phase(total + 3) is Phase.END
    else:
        assert plan.phase(total + 3) is Phase.SPARSE


def test_the_description_says_what_the_settings_meant():
    assert StepPlan(4, 2).describe() == "step 1 of 4 dense"
    assert StepPlan(20, 2, 1).describe() == "steps 1-2 of 20 dense, from step 20 dense again"
    assert StepPlan(20, 0).describe() == "step 1 of 20 records"
    assert "no step left to skip in" in StepPlan(2, 1, 1).describe()
    assert StepPlan(4, 2).describe(continues=True) == "4 steps with the masks of the run before and without warm-up"
    assert "no step left to skip in" not in StepPlan(2, 1, 1).describe(continues=True)
    assert "no step left to skip in" in StepPlan(2, 1, 2).describe(continues=True)


@pytest.mark.parametrize("total, warmup, end, phases", [
    (1, 2, 0, [R]), (2, 2, 0, [R, S]), (4, 1, 3, [R, E, E, E]), (12, 3, 9, [W, W, R] + [E] * 9), (4, 1, 9, [E] * 4)])
def test_a_run_that_is_continued_records_also_where_it_cannot_skip(total, warmup, end, phases):
    plan = StepPlan(total, warmup, end, continued=True)
    assert [plan.phase(step) for step in range(total)] == phases
    told = plan.describe()
    assert ("records for the run that continues it" in told) == (R in phases and S not in phases)
    assert ("no step left to skip in" in told) == (R not in phases)


@pytest.mark.parametrize("total", range(2, FEW_STEPS + 1))
@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_few_steps_warm_up_in_one_and_skip_in_the_second(total, warmup):
    plan = StepPlan(total, warmup)
    assert plan.dense_steps == 1 and [plan.phase(step) for step in range(total)] == [R] + [S] * (total - 1)
