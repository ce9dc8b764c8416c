"""What a run tells: the headline, lines in a fixed order, what to try, and plain values."""

import json

import pytest

from liteattention.runtime import ErrorBudget, RunSummary, StepReport, Threshold, TimeSaved
from liteattention.runtime.reasons import (
    CROSS_ATTENTION,
    DENSE_BLOCK,
    DENSE_FASTER,
    MOVING_WINDOWS,
    NO_BACKEND,
    NO_MEMORY,
    NOT_VIDEO,
    REASONS,
    TOO_SHORT,
    WARMUP,
)
from liteattention.runtime.schedule import StepPlan
from liteattention.runtime.summary import NOT_REACHED, advise, bytes_text

FASTER_DENSE = "a faster dense attention"
TIMED = {"seconds": 70.0, "saved": TimeSaved(80.0, 50.0, "timed calls")}
SLOWER = {"seconds": 70.0, "saved": TimeSaved(50.0, 60.0, "the clock")}
AS_FAST = {"seconds": 70.0, "saved": TimeSaved(50.0, 50.5, "the clock")}


def summary(**changes):
    return RunSummary(**{
        "plan": "steps 1-2 of 20 dense", "rule": "error_budget 0.3", "steps_done": 20, "total_steps": 20,
        "forward_passes": 20, "sparse_calls": 760, "dense_calls": {CROSS_ATTENTION: 800, WARMUP: 40},
        "tiles_computed": 60, "tiles_total": 100, "dense_tiles": 5, "skipped_per_step": [0.0, 0.0, *[0.44] * 18],
        "layers": {"double 0": [None, 0.0, *[0.44] * 18]}, "mask_bytes": 2**26, "tokens": 32760,
        "backend": "triton backend on cuda:0"} | changes)


def advice(faster_dense="", rule=None, **changes):
    return advise(summary(**changes), rule or ErrorBudget(0.3), faster_dense)


def test_the_lines_of_a_run_have_a_fixed_order():
    told = summary(**TIMED, dense_calls={CROSS_ATTENTION: 800, WARMUP: 40, DENSE_FASTER: 60, NOT_VIDEO: 20},
                   fallback="PyTorch's attention", notes=["a note", "another"], advice=["this first", "that then"],
                   break_evens=[{"density": 0.8, "source": "table"}] * 2)
    assert told.lines() == [
        "on: 40.0% of attention skipped, 1.43x as fast as dense; try: this first",
        "try: that then",
        "time: 70.0 s, dense about 100.0 s, of which attention 80%",
        "quality: error_budget 0.3, steps 1-2 of 20 dense",
        "self-attention: 760 of 860 calls sparse, dense: 60 dense attention is faster here, 40 warm-up step, "
        "800 cross-attention calls, 20 calls over other tokens (dense by PyTorch's attention)",
        "dense attention is faster above 80% (table) of the tiles",
        "a note", "another",
        "masks: 64.0 MB, triton backend on cuda:0"]
    assert told.text() == "; ".join(told.lines())


def test_the_headline_says_on_with_what_is_known():
    assert summary().headline() == "on: 40.0% of attention skipped"
    assert summary(**TIMED).headline() == "on: 40.0% of attention skipped, 1.43x as fast as dense"
    assert summary(**SLOWER).headline() == "on: 40.0% of attention skipped, slower: 0.86x of dense"
    assert summary(**AS_FAST).headline().endswith(", 0.99x as fast as dense") and not summary(**AS_FAST).slower


def test_a_slowdown_comes_with_what_to_do_first():
    for changes in ({}, {"tiles_computed": 99}):
        assert "bypass the node here" in advice(**SLOWER, **changes)[0] and len(advice(**SLOWER, **changes)) == 1
    assert advice(**AS_FAST) == [] and summary(**SLOWER).to_dict()["slower"]


@pytest.mark.parametrize("dense_calls, said", [
    ({}, f"off: {NOT_REACHED}"),
    ({CROSS_ATTENTION: 40, WARMUP: 20}, "off: warm-up step"),
    ({CROSS_ATTENTION: 40, DENSE_BLOCK: 20}, "off: dense_blocks"),
    ({CROSS_ATTENTION: 40}, "off: cross-attention"),
    ({CROSS_ATTENTION: 80, WARMUP: 40, NO_BACKEND: 20}, "off: no fast backend on this device; try: install what the "
                                                        "note about the device names"),
    ({NO_MEMORY: 9, MOVING_WINDOWS: 10}, "off: context windows move between steps; try: choose a context schedule"),
])
def test_the_headline_says_off_with_the_reason_and_what_to_try(dense_calls, said):
    told = summary(sparse_calls=0, dense_calls=dense_calls, dense_tiles=100, tiles_computed=100,
                   advice=advice(sparse_calls=0, dense_calls=dense_calls))
    assert told.headline().startswith(said) and told.lines()[0] == told.headline()


def test_a_run_that_no_call_reached_has_nothing_else_to_tell():
    assert summary(sparse_calls=0, dense_calls={}, notes=["a note"]).lines() == [f"off: {NOT_REACHED}", "a note"]


def test_why_no_self_attention_was_reached_comes_first():
    for dense_calls in ({}, {CROSS_ATTENTION: 40}):
        told = summary(sparse_calls=0, dense_calls=dense_calls, unreached="no call: a node")
        assert told.headline() == "off: no call: a node"


def test_time_is_told_where_attention_was_timed_and_sparse():
    timed = summary(**TIMED)
    assert timed.dense_run_seconds == 100.0 and timed.attention_share == pytest.approx(0.8)
    assert timed.speed_up == pytest.approx(100 / 70) and timed.saved.share == pytest.approx(0.375)
    for untimed in (summary(seconds=70.0), summary(saved=TimeSaved(80.0, 50.0, "timed calls")),
                    summary(sparse_calls=0, seconds=70.0, saved=TimeSaved(80.0, 80.0, "the clock"))):
        assert untimed.speed_up is None and "time:" not in untimed.text()


def test_the_report_adds_layers_and_versions():
    told = summary(environment={"torch": "2.11", "device": "cpu"},
                   layers={"double 0": [0.0, 0.5], "double 1": [0.2, None], "double 2": [None, None]})
    assert told.report().split("\n") == [
        *told.lines(), "layers when last run: 20% (double 1) to 50% (double 0) skipped", "torch 2.11, device cpu"]
    assert summary(layers={}).report() == "\n".join(summary(layers={}).lines())


def test_the_values_are_plain_and_whole():
    told = summary(**TIMED, dense_calls={CROSS_ATTENTION: 800, NO_MEMORY: 1}, advice=["this"], settings={"a": 1})
    values = json.loads(json.dumps(told.to_dict()))
    assert values == told.to_dict()
    assert values["dense_calls"] == {"cross-attention": 800, "no memory for the skip mask": 1}
    assert values["expected"] == values["not_self_attention"] == ["cross-attention"]
    assert values["headline"] == told.headline()
    assert (values["skipped"], values["dense_run_seconds"], values["speed_up"]) == (0.4, 100.0, 100 / 70)
    assert values["saved"] == {"dense_seconds": 80.0, "sparse_seconds": 50.0, "source": "timed calls"}
    assert values["layers"]["double 0"][:3] == [None, 0.0, 0.44]
    json.dumps(summary(dense_calls={reason: 1 for reason in REASONS}).to_dict())


def test_a_run_that_went_well_needs_no_advice():
    assert advice() == advice(**TIMED) == []


def test_where_attention_is_not_the_time_the_advice_says_so():
    short = {"seconds": 95.0, "saved": TimeSaved(10.0, 5.0, "timed calls")}
    assert "attention is only 10% of this run's time" in advice(**short)[0]
    # A faster dense attention would not help there either.
    assert len(advice(FASTER_DENSE, dense_tiles=40, **short)) == 1


def test_a_faster_dense_attention_is_named_where_much_stays_dense():
    assert advice(FASTER_DENSE, dense_tiles=25) == [FASTER_DENSE]
    assert advice(FASTER_DENSE, dense_tiles=5) == [] and advice("", dense_tiles=25) == []


@pytest.mark.parametrize("reason", [reason for reason in REASONS if not reason.expected and reason != DENSE_FASTER])
def test_the_reason_of_most_dense_calls_decides(reason):
    assert advice(dense_calls={CROSS_ATTENTION: 900, reason: 800, DENSE_FASTER: 20})[0] == reason.hint
    assert advice(dense_calls={CROSS_ATTENTION: 900, reason: 700}) == [], "most are sparse"


@pytest.mark.parametrize("rule, said", [(ErrorBudget(0.3), "(now 0.3) to skip more, and look at the video; fewer"),
                                        (Threshold(-10), "raise threshold to -8 (now -10)"),
                                        (ErrorBudget(1), "fewer steps save more")])
def test_a_rule_that_skips_little_is_to_be_bolder_as_far_as_it_goes(rule, said):
    assert said in advice(rule=rule, tiles_computed=98)[0]
    assert said in advice(rule=rule, dense_calls={DENSE_FASTER: 900})[0]
    assert len(advice(rule=rule, tiles_computed=98, dense_calls={DENSE_FASTER: 900})) == 1


@pytest.mark.parametrize("sparse_calls", [0, 40])
def test_a_run_without_a_step_to_skip_in_is_told_so(sparse_calls):
    plan = StepPlan(2, 1, 1).describe()
    assert "lower warmup_steps" in advice(plan=plan, sparse_calls=sparse_calls, tiles_computed=100)[0]


def test_a_run_that_was_stopped_gets_no_advice():
    assert advice(tiles_computed=98, steps_done=3, dense_calls={TOO_SHORT: 900}) == []


@pytest.mark.parametrize("saved, lines", [
    (None, []), (TimeSaved(10.0, 8.0, "timed calls"), ["attention: 2.0 s saved so far"]),
    (TimeSaved(8.0, 10.0, "the clock"), ["attention: 2.0 s more so far"])])
def test_a_step_has_two_lines_that_fit_the_node(saved, lines):
    report = StepReport(17, 20, 0.61, 0.48, 2**26, "sparse", saved)
    assert report.lines() == ["step 17/20 (sparse): skipped 61%, run 48%", *lines]
    assert "no attention ran" in StepReport(1, 20, None, 0.0, 0, "sparse").lines()[0]


@pytest.mark.parametrize("nbytes, text", [(0, "0.0 KB"), (14_438, "14.1 KB"), (7_864_320, "7.5 MB")])
def test_bytes(nbytes, text):
    assert bytes_text(nbytes) == text
