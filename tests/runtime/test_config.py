"""Settings: what is refused, and with which words."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liteattention.runtime import LiteAttentionConfig, parse_blocks


@pytest.mark.parametrize("value", [4.0, -30.5, math.nan, math.inf, -math.inf, "x", None])
def test_bad_thresholds_name_value_and_range(value):
    with pytest.raises(ValueError, match="threshold is .*log2 value from -30 to 0"):
        LiteAttentionConfig(threshold=value)


def test_a_positive_threshold_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean -4.0"):
        LiteAttentionConfig(threshold=4.0)


@pytest.mark.parametrize("name", ["warmup_steps", "dense_end_steps", "min_tokens", "max_state_mb", "refresh_every"])
@pytest.mark.parametrize("value", [-1, 2.5, True, 10**9, None])
def test_bad_whole_numbers_name_the_input(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; it is a whole number from"):
        LiteAttentionConfig(**{name: value})


@pytest.mark.parametrize("value", ["fp8", "", "INT8", None, 8])
def test_bad_precisions_name_the_allowed_ones(value):
    with pytest.raises(ValueError, match=rf"^precision is {value!r}; allowed: auto, full, int8\.$"):
        LiteAttentionConfig(precision=value)


@pytest.mark.parametrize("name", ["never_slower", "pool_skipped"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_switches_are_on_or_off(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; allowed: True, False\.$"):
        LiteAttentionConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, True, "0.1", None])
def test_bad_budgets_name_the_range(value):
    with pytest.raises(ValueError, match=rf"^error_budget is {value!r}; it is a share from 0 \(off\) to 1\.$"):
        LiteAttentionConfig(error_budget=value)


@pytest.mark.parametrize("seqlen, tiles", [(1, 1), (128, 1), (129, 2), (75_600, 591)])
def test_a_budget_is_shared_by_the_key_tiles(seqlen, tiles):
    config = LiteAttentionConfig(error_budget=0.05)
    assert config.criterion == "mass" and 2 ** config.call_threshold(seqlen) * tiles == pytest.approx(0.05)
    assert "error_budget 0.05" in config.rule


def test_without_a_budget_the_threshold_decides():
    config = LiteAttentionConfig(threshold=-7.5)
    assert (config.criterion, config.call_threshold(75_600), config.rule) == ("max", -7.5, "threshold -7.5")


def test_new_settings_come_last_for_workflows_that_are_saved():
    assert LiteAttentionConfig(-10.0, 2, 0, "", 0, 512, False) == LiteAttentionConfig()
    assert LiteAttentionConfig(-10.0, 2, 0, "", 0, 512, False, "auto", True, 0.0, 0, True) == LiteAttentionConfig()


@pytest.mark.parametrize("text, total, blocks", [
    ("", 5, []),
    ("0-1, 38, -1", 40, [0, 1, 38, 39]),
    ("0--1", 5, [0, 1, 2, 3, 4]),
    ("-2--1", 5, [3, 4]),
    ("3", 5, [3]),
    (" 1  2,,3 ", 5, [1, 2, 3]),
    ("7-9", 5, []),
    ("-9", 5, []),
])
def test_blocks(text, total, blocks):
    found = parse_blocks(text)
    assert [i for i in range(total) if found.holds(i, total)] == blocks


def test_negative_blocks_match_nothing_where_the_model_does_not_say_its_count():
    found = parse_blocks("0, -1, 2--1")
    assert [i for i in range(9) if found.holds(i, None)] == [0]


@pytest.mark.parametrize("text, part", [("x", "x"), ("1,y", "y"), ("1-2-3", "1-2-3"), ("1.5", "1.5"), ("--", "--")])
def test_bad_blocks_name_the_part(text, part):
    with pytest.raises(ValueError, match=rf'dense_blocks is "{text}": "{part}" is not a block number'):
        LiteAttentionConfig(dense_blocks=text)


@pytest.mark.parametrize("text", ["5-3", "-1--3"])
def test_backward_ranges_are_refused(text):
    with pytest.raises(ValueError, match="runs backwards"):
        parse_blocks(text)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=6), st.integers(1, 60))
def test_blocks_are_the_union_of_their_ranges(ranges, total):
    text = ", ".join(f"{a}-{a + n}" if n else f"{a}" for a, n in ranges)
    wanted = {i for a, n in ranges for i in range(a, a + n + 1)}
    found = parse_blocks(text)
    assert {i for i in range(total) if found.holds(i, total)} == {i for i in wanted if i < total}
