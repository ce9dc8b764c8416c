"""A run as a picture: whatever it did, there is a legible one."""

import pytest
import torch

from liteattention.report import MaskPicture, draw_run
from liteattention.report.canvas import BLUE, VERMILION
from liteattention.runtime import RunSummary, TimeSaved
from liteattention.runtime.reasons import CROSS_ATTENTION, NO_MEMORY, Reason


def stats(steps=4, layers=3, **changes):
    shares = [min(0.9, 0.1 * step) for step in range(steps)]
    return RunSummary(**{
        "plan": "step 1 of 4 dense", "rule": "error_budget 0.1", "steps_done": steps, "total_steps": steps,
        "forward_passes": steps, "sparse_calls": 3 * steps, "dense_calls": {CROSS_ATTENTION: 2 * steps, NO_MEMORY: 1},
        "tiles_computed": 600, "tiles_total": 1000, "dense_tiles": 100, "skipped_per_step": shares,
        "mask_bytes": 12345, "tokens": 2304, "backend": "torch backend on cpu",
        "layers": {f"block {n}": list(shares) for n in range(layers)}} | changes).to_dict()


def has(picture, color):
    return bool((picture == torch.tensor(color) / 255).all(-1).any())


def mask(rows=18, head=None, layer=0):
    skipped = (torch.arange(rows * rows).view(rows, rows) % 256).to(torch.uint8)
    edges = tuple(x * 2.0 for x in range(rows // 2 + 1))
    return MaskPicture(f"block {layer}", head, 12, skipped, (rows, rows), 0.5, edges)


@pytest.mark.parametrize("steps, layers", [(0, 0), (1, 1), (4, 3), (20, 40), (1000, 60)])
@pytest.mark.parametrize("masks", [0, 1, 8])
def test_any_run_has_a_picture(steps, layers, masks):
    dense_calls = {Reason(f"a reason that is long {'x' * 80} {n}", ""): n + 1 for n in range(9)}
    run = stats(steps, layers, dense_calls=dense_calls)
    panels = [mask(18 if n % 2 else 512, n, n // 2) for n in range(masks)]
    picture = draw_run(run, panels)
    assert picture.shape == (1, 1200, 1600, 3) and picture.dtype == torch.float32
    assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.05
    assert picture.equal(draw_run(run, panels))


def test_a_run_that_nothing_reached_has_a_picture():
    run = stats(layers=0, sparse_calls=0, dense_calls={}, tiles_total=0, tiles_computed=0, skipped_per_step=[None] * 4)
    assert draw_run(run).shape == (1, 1200, 1600, 3)


def test_steps_and_layers_without_attention_have_a_look_of_their_own():
    run = stats(layers=1)
    for changes in ({"skipped_per_step": [0.0, None, 0.2, 0.3]}, {"layers": {"block 0": [0.0, None, 0.2, 0.3]}}):
        assert not draw_run(run | changes).equal(draw_run(run))


def test_what_changes_in_a_run_changes_the_picture():
    usual = draw_run(stats(), [mask()])
    for changes in ({"sparse_calls": 1}, {"dense_calls": {}}, {"skipped_per_step": [0.5] * 4}, {"mask_bytes": 2**28},
                    {"advice": ["this"]}, {"rule": "threshold -10"}):
        assert not draw_run(stats(**changes), [mask()]).equal(usual), changes
    assert not draw_run(stats(), [mask(20)]).equal(usual)


def test_a_reason_that_is_expected_has_another_colour():
    normal, odd = (Reason("why", "", expected) for expected in (True, False))
    assert not draw_run(stats(dense_calls={normal: 9})).equal(draw_run(stats(dense_calls={odd: 9})))


def test_a_timed_run_says_how_fast_it_was_and_a_slowdown_looks_like_one():
    faster, slower, untimed = (draw_run(stats(seconds=10.0, saved=saved)) for saved in (
        TimeSaved(12.0, 7.0, "timed calls"), TimeSaved(7.0, 12.0, "timed calls"), None))
    assert not faster.equal(untimed)
    assert [has(picture, VERMILION) for picture in (faster, slower, untimed)] == [False, True, False]


def test_calls_of_other_attention_have_no_bar():
    """They are never sparse: next to them a run that went well would look half done."""
    usual = stats(dense_calls={CROSS_ATTENTION: 90})
    assert not has(draw_run(usual), BLUE) and has(draw_run(usual | {"not_self_attention": []}), BLUE)
    assert not draw_run(usual).equal(draw_run(stats(dense_calls={}))), "their number is told"
