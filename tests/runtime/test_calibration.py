"""Calibration: what a run with the profile does on the data it was made on, what it costs, and when there is none."""

import math
from dataclasses import replace

import pytest
import torch
from run_kit import Previous, dense

from liteattention.runtime import (
    AttentionCall,
    CalibrationSession,
    CalibrationTarget,
    LayerId,
    LiteAttentionConfig,
    ProfileHandle,
    Session,
)
from liteattention.runtime.calibration import TARGET_MAX, attention_error
from liteattention.runtime.config import THRESHOLD_MIN
from liteattention.runtime.lanes import LayerCalibration, Staircase

N, HEADS, D, STEPS = 640, 2, 64, 10
LAYERS = [LayerId("double", i, 2) for i in range(2)]
SETTINGS = {"warmup_steps": 1, "min_tokens": 128}


def drifting(step, layer, turn=None):
    """q, k, v [2, N, H*D] whose key tiles differ in strength. They drift from step to step; from step `turn` on the
    tiles that mattered least matter most, which no mask that was made before can bear."""
    generator = torch.Generator().manual_seed(100 * layer)
    q, k, v = (torch.randn(2, N, HEADS, D, generator=generator) for _ in range(3))
    noise = torch.randn(2, N, HEADS, D, generator=generator)
    k = k + 0.1 * math.sin(step) * noise
    strength = torch.tensor([9.0, 0.0, 5.0, 2.0, 6.5])
    strength = strength.flip(0).roll(1) if turn is not None and step >= turn else strength + 0.05 * step
    q[..., 0] += 8 + layer
    k[..., 0] += strength[torch.arange(N) // 128].view(1, N, 1)
    return [x.flatten(2) for x in (q, k, v)]


def play(session, steps=STEPS, turn=None, rows=(("negative", "positive"),), evaluations=1, metric="relative L2"):
    """Every step through `session`; errors against dense attention by (step, layer), the worst of all calls."""
    errors = {}
    previous = Previous()
    for step in range(steps):
        for _ in range(evaluations):
            for names in rows:
                context = session.evaluation(model="m", rows=list(names), latent_tokens=N)
                for number, layer in enumerate(LAYERS):
                    first = ("negative", "positive").index(names[0])
                    q, k, v = (x[first:first + len(names)] for x in drifting(step, number, turn))
                    expected = dense(q, k, v)

                    def run_previous(expected=expected):
                        previous.calls += 1
                        return expected

                    out = context.attend(AttentionCall.from_hook(q, k, v, HEADS), layer, run_previous)
                    error = float(attention_error(out, expected, metric))
                    errors[step, number] = max(errors.get((step, number), 0.0), error)
        session.end_step(step)
    return errors, previous.calls


def calibrate(target=0.02, metric="relative L2", criterion="mass", pool_skipped=True, **kwargs):
    session = CalibrationSession(LiteAttentionConfig(pool_skipped=pool_skipped, **SETTINGS), STEPS,
                                 target=CalibrationTarget(target, metric, criterion))
    errors, _ = play(session, metric=metric, **kwargs)
    profile, problem = session.calibrated("TinyWan")
    assert problem == ""
    return session, profile, errors


def replay(profile, steps=STEPS, **kwargs):
    session = Session(LiteAttentionConfig(**SETTINGS), steps, profile=profile)
    errors, _ = play(session, steps, metric=profile.metric, **kwargs)
    return session.close(), errors


SEPARATE = (("negative",), ("positive",))


@pytest.mark.parametrize("settings, how", [
    ({}, {}), ({}, {"rows": SEPARATE}), ({}, {"evaluations": 2}), ({}, {"turn": 5}), ({"criterion": "max"}, {}),
    ({"criterion": "max"}, {"turn": 5}), ({"pool_skipped": False}, {"turn": 5, "rows": SEPARATE}),
    ({"metric": "relative L1", "target": 0.03}, {}), ({"metric": "cosine", "target": 2e-4}, {})], ids=str)
def test_every_call_of_a_replay_is_within_the_target_and_tiles_are_skipped(settings, how):
    session, profile, during = calibrate(**settings, **how)
    receipt, errors = replay(profile, **how)
    tolerance = 1e-6  # of two ways to compute dense attention
    assert max(errors.values()) <= profile.target_error + tolerance
    assert max(during.values()) <= profile.target_error + tolerance, "the calibrating run itself is within it, too"
    assert receipt.skipped > 0.02 and receipt.left.keys() <= {"warm-up step"}
    if "evaluations" not in how:  # the second evaluation after a recording is measured a step later
        measured = {(step, layer): error for layer, row in enumerate(profile.achieved_error)
                    for step, error in enumerate(row)}
        assert errors == pytest.approx(measured, abs=2e-6)
    restarts = [step for row in profile.restarts for step, restart in enumerate(row) if restart]
    assert ("turn" in how) <= (5 in restarts)


def test_a_call_costs_at_most_two_evaluations_more():
    for kwargs in ({}, {"turn": 5}, {"rows": SEPARATE}):
        session, _, _ = calibrate(**kwargs)
        assert 0 < session.most_extra <= 2 and session.extra <= 2 * session.calls

    session = CalibrationSession(LiteAttentionConfig(**SETTINGS), STEPS, target=CalibrationTarget())
    _, previous_calls = play(session, turn=5)
    assert previous_calls <= session.calls, "at most one dense attention a call"


def test_the_worst_batch_row_counts():
    out, expected = torch.zeros(2, 5, 8), torch.ones(2, 5, 8)
    out[0] = 1.0
    out[1] = 0.9
    for metric, error in (("relative L2", 0.1), ("relative L1", 0.1), ("cosine", 0.0)):
        assert float(attention_error(out, expected, metric)) == pytest.approx(error, abs=1e-6)
        assert float(attention_error(out[:1], expected[:1], metric)) == pytest.approx(0.0, abs=1e-6)
    out[1, 0, 0] = torch.nan
    assert math.isinf(float(attention_error(out, expected, "relative L2")))


def test_a_run_that_was_stopped_and_one_that_took_nothing_give_no_profile():
    session = CalibrationSession(LiteAttentionConfig(**SETTINGS), STEPS, target=CalibrationTarget())
    play(session, STEPS - 1)
    assert session.calibrated("x") == (None, "the calibrating run was stopped after 9 of 10 steps")
    session = CalibrationSession(LiteAttentionConfig(warmup_steps=1, min_tokens=4096), STEPS,
                                 target=CalibrationTarget())
    play(session)
    profile, problem = session.calibrated("x")
    assert profile is None and "receipt" in problem
    handle = ProfileHandle()
    handle.set(profile, problem)
    with pytest.raises(ValueError, match="receipt"):
        handle.get()


def test_a_profile_made_at_other_steps_serves_and_says_what_it_does_not_fit():
    _, profile, _ = calibrate()
    for steps in (5, 25):
        receipt, _ = replay(profile, steps)
        assert receipt.skipped > 0.02 and "TinyWan" in receipt.rule and not receipt.notes
    first, second = profile.layers
    other = replace(profile, seqlen=4096, layers=(first, replace(second, heads=4)))
    session = Session(LiteAttentionConfig(**SETTINGS, refresh_every=4), STEPS, profile=other)
    play(session)
    receipt = session.close()
    assert receipt.left["profile made for another size of the model"] == STEPS and receipt.taken == STEPS
    assert any("4096 tokens" in note for note in receipt.notes) and any("for 4 of 64" in note for note in receipt.notes)
    assert any("refresh_every" in note for note in receipt.notes) and receipt.refreshed == 0
    only = replace(profile, **{name: getattr(profile, name)[:1] for name in (
        "layers", "thresholds", "restarts", "achieved_error")})
    assert replay(only)[0].left["layer not in the profile"] == STEPS


def test_the_staircase_grows_while_the_answer_stays_and_shrinks_when_it_changes():
    stairs = Staircase(-5.0)
    values = []
    for passed in (True, True, True, False, False, True):
        stairs.answer(passed)
        values.append(stairs.value)
    steps = [b - a for a, b in zip([-5.0, *values], values, strict=False)]
    assert steps[0] > 0 and steps[0] < steps[1] < steps[2] and steps[3] < 0 < steps[5]
    assert abs(steps[3]) < steps[2] and abs(steps[4]) > abs(steps[3]) and steps[5] < abs(steps[4])
    for _ in range(50):
        stairs.answer(False)
    assert stairs.value == THRESHOLD_MIN


def test_a_lane_that_exceeds_the_target_restarts_and_keeps_what_was_before():
    layer = LayerCalibration(1, 64, 0.02, -5.0)
    for step, errors in enumerate(([0.0], [0.01, 0.0], [0.05, 0.01], [0.05, 0.021], [0.0], [0.001, 0.0])):
        layer.begin(step, step / 6)
        assert len(layer.lanes) == len(errors)
        for lane, error in zip(layer.lanes, errors, strict=True):
            lane.measured(step, error)
    lane = layer.finish()
    assert lane.restarts == {3} and sorted(lane.thresholds) == [0, 4]
    assert lane.errors == {0: 0.0, 1: 0.01, 2: 0.01, 3: 0.0, 4: 0.0, 5: 0.001}


@pytest.mark.parametrize("field, value", [("error", 0.0), ("error", TARGET_MAX + 0.1), ("error", math.nan),
                                          ("error", True), ("metric", "L3"), ("criterion", "min")])
def test_targets_are_checked(field, value):
    with pytest.raises(ValueError, match="target_error" if field == "error" else field):
        CalibrationTarget(**{field: value})
