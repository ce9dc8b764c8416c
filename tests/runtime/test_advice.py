"""What a receipt says about time, and what it advises."""

import pytest

from liteattention.runtime import LiteAttentionConfig, policy
from liteattention.runtime.advice import advise
from liteattention.runtime.receipt import Receipt, StepReport
from liteattention.runtime.savings import Saved

KITCHEN = "a faster dense attention"


def receipt(**changes):
    return Receipt(**{
        "plan": "steps 1-2 of 20 dense", "steps_done": 20, "total_steps": 20, "evaluations": 20, "taken": 760,
        "left": {policy.CROSS_ATTENTION: 800, "warm-up step": 40}, "tiles_computed": 60, "tiles_total": 100,
        "skipped_per_step": [0.0, 0.0, *[0.44] * 18], "attention_seconds": None, "state_bytes": 2**26, "tokens": 32760,
        "backend": "triton backend on cuda:0", "dense_tiles": 5} | changes)


def advice(faster_dense="", profile=False, settings=None, **changes):
    return advise(receipt(**changes), LiteAttentionConfig(**settings or {}), profile, faster_dense)


def test_a_run_that_went_well_needs_none():
    assert advice() == [] and advice(seconds=100.0, saved=Saved.of(80.0, 50.0, "timed calls")) == []


def test_the_speed_of_a_run_is_told_where_attention_was_timed():
    timed = receipt(seconds=70.0, saved=Saved.of(80.0, 50.0, "timed calls"))
    assert timed.dense_run_seconds == 100.0 and timed.attention_share == pytest.approx(0.8)
    assert timed.lines()[1] == "sampling: 70.0 s instead of about 100.0 s (1.43x), attention 80% of that"
    assert timed.to_dict()["dense_run_seconds"] == 100.0
    slower = receipt(seconds=70.0, saved=Saved.of(50.0, 60.0, "log_details"))
    assert "70.0 s instead of about 60.0 s (0.86x)" in slower.text()
    for untimed in (receipt(seconds=70.0, saved=Saved(0.4)), receipt(saved=Saved.of(80.0, 50.0, "timed calls")),
                    receipt(taken=0, seconds=70.0, saved=Saved.of(80.0, 80.0, "log_details"))):
        assert "sampling:" not in untimed.text()


def test_where_attention_is_not_the_time_the_advice_says_so():
    short = dict(seconds=95.0, saved=Saved.of(10.0, 5.0, "timed calls"))
    assert "attention is only 10% of this run's time" in advice(**short)[0]
    # A faster dense attention would not help there either.
    assert len(advice(KITCHEN, dense_tiles=40, **short)) == 1


def test_a_faster_dense_attention_is_named_where_much_stays_dense():
    assert advice(KITCHEN, dense_tiles=25) == [KITCHEN]
    assert advice(KITCHEN, dense_tiles=5) == [] and advice("", dense_tiles=25) == []


@pytest.mark.parametrize("left, settings, said", [
    ({policy.DENSE_FASTER: 900}, {}, "raise threshold to -8"),
    ({policy.DENSE_FASTER: 900}, {"error_budget": 0.3}, "raise error_budget"),
    ({policy.NO_BACKEND: 900}, {}, "install what the note"),
    ({"fewer than 4096 tokens": 900}, {}, "more frames or pixels"),
    ({policy.OVER_STATE_LIMIT: 900}, {}, "raise max_state_mb"),
])
def test_the_reason_that_most_was_left_for_decides(left, settings, said):
    assert said in advice(left=left, settings=settings)[0]


def test_too_bold_and_too_careful():
    assert "lower threshold to -12" in advice(refreshed=1000, came_back=100)[0]
    assert "raise threshold to -8" in advice(tiles_computed=98)[0]
    assert "lower warmup_steps" in advice(tiles_computed=100, skipped_per_step=[0.0] * 20)[0]
    assert "a profile made for a larger error" in advice(tiles_computed=98, profile=True)[0]
    assert advice(tiles_computed=98, steps_done=3) == [], "a run that was stopped"


@pytest.mark.parametrize("saved, second", [
    (None, "masks 64.0 MB"), (Saved(0.07), "~7% of attention time saved, masks 64.0 MB"),
    (Saved.of(10.0, 8.0, "timed calls"), "2.0 s (20%) of attention saved, masks 64.0 MB"),
    (Saved.of(8.0, 10.0, "log_details"), "25% more attention time so far, masks 64.0 MB")])
def test_a_step_has_two_lines_that_fit_the_node(saved, second):
    lines = StepReport(17, 20, 0.61, 0.48, 2**26, "sparse step", saved).text().splitlines()
    assert lines == ["step 17/20 (sparse): skipped 61%, run 48%;", second] and max(map(len, lines)) <= 50
