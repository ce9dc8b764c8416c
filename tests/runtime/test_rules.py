"""The two rules: what they ask of a call, what they refuse, and what to change to skip more."""

import math

import pytest

from liteattention.runtime import ErrorBudget, Threshold

LAYER = None


@pytest.mark.parametrize("value", [4.0, -30.5, math.nan, math.inf, -math.inf, "x", None, True])
def test_bad_thresholds_name_value_and_range(value):
    with pytest.raises(ValueError, match=r"^threshold is .*log2 value from -30 to 0\."):
        Threshold(value)


def test_a_positive_threshold_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean -4.0"):
        Threshold(4.0)


@pytest.mark.parametrize("value", [0, 0.009, 1.01, math.nan, True, "0.1", None])
def test_bad_budgets_name_value_and_range(value):
    with pytest.raises(ValueError, match=rf"^error_budget is {value!r}; it is a share from 0\.01 to 1\.$"):
        ErrorBudget(value)


@pytest.mark.parametrize("seqlen, tiles", [(1, 1), (128, 1), (129, 2), (75_600, 591)])
def test_a_budget_is_shared_by_the_key_tiles(seqlen, tiles):
    test = ErrorBudget(0.05).skip_test(LAYER, 3, seqlen)
    assert test.criterion == "mass" and 2 ** test.threshold * tiles == pytest.approx(0.05)
    assert ErrorBudget(0.05).text == "error_budget 0.05"


def test_a_threshold_is_the_same_for_any_length():
    rule = Threshold(-7.5)
    assert rule.skip_test(LAYER, 0, 128) == rule.skip_test(LAYER, 9, 75_600) == (-7.5, "max")
    assert rule.text == "threshold -7.5"


def test_what_skips_more_is_named_as_long_as_there_is_more():
    more, beyond = " to skip more, and look at the video", "; fewer steps can be closer to dense"
    assert ErrorBudget(0.1).bolder() == f"raise error_budget (now 0.1){more}" and ErrorBudget(1.0).bolder() is None
    assert ErrorBudget(0.3).bolder() == f"raise error_budget (now 0.3){more}{beyond}"
    assert Threshold(-10).bolder() == f"raise threshold to -8 (now -10){more}"
    assert Threshold(-5).bolder() == f"raise threshold to -3 (now -5){more}" and Threshold(0).bolder() is None
    assert Threshold(-1).bolder() == f"raise threshold to 0 (now -1){more}{beyond}"
