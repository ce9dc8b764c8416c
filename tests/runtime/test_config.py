"""Settings: what is refused, and with which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liteattention.runtime import ErrorBudget, LiteAttentionConfig, Threshold, parse_blocks


def test_the_defaults():
    assert LiteAttentionConfig().to_dict() == {
        "rule": "error_budget 0.3", "warmup_steps": 2, "dense_end_steps": 0, "dense_blocks": "", "min_tokens": 0,
        "precision": "auto", "pool_skipped": True}
    assert LiteAttentionConfig().rule == ErrorBudget(0.3)


def test_settings_are_plain_values_for_json():
    settings = LiteAttentionConfig(rule=Threshold(-7.5), dense_blocks="0, -1").to_dict()
    assert json.loads(json.dumps(settings)) == settings and settings["rule"] == "threshold -7.5"


@pytest.mark.parametrize("name", ["warmup_steps", "dense_end_steps", "min_tokens"])
@pytest.mark.parametrize("value", [-1, 2.5, True, 10**9, None])
def test_bad_whole_numbers_name_the_input(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; it is a whole number from"):
        LiteAttentionConfig(**{name: value})


@pytest.mark.parametrize("value", ["fp8", "", "INT8", None, 8])
def test_bad_precisions_name_the_allowed_ones(value):
    with pytest.raises(ValueError, match=rf"^precision is {value!r}; allowed: auto, full, int8\.$"):
        LiteAttentionConfig(precision=value)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_switch_is_on_or_off(value):
    with pytest.raises(ValueError, match=rf"^pool_skipped is {value!r}; allowed: True, False\.$"):
        LiteAttentionConfig(pool_skipped=value)


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
