"""The summaries of several ranks as one."""

from dataclasses import replace

import pytest
from run_kit import LAYERS, play, sampling_run

from liteattention.runtime import TimeSaved
from liteattention.runtime.merged_summary import from_plain, merged, to_plain
from liteattention.runtime.reasons import CROSS_ATTENTION, OUT_OF_MEMORY


def summary(**changes):
    run = sampling_run(4, warmup_steps=1)
    play(run, 4)
    return replace(run.close(), **changes)


def test_calls_tiles_and_masks_are_summed_and_the_slowest_rank_gives_the_times():
    one = summary(seconds=8.0, saved=TimeSaved(6.0, 3.0, "the clock"))
    other = replace(one, seconds=9.0, tiles_computed=one.tiles_total, saved=TimeSaved(5.0, 4.0, "the clock"))
    both = merged([one, other])
    for name in ("sparse_calls", "tiles_total", "dense_tiles", "mask_bytes"):
        assert getattr(both, name) == 2 * getattr(one, name) > 0 or name == "dense_tiles"
    assert both.ranks == [one.skipped, 0.0] and one.skipped > 0
    assert both.skipped == pytest.approx(one.skipped / 2)
    assert (both.seconds, both.saved.dense_seconds, both.saved.sparse_seconds) == (9.0, 6.0, 4.0)
    assert both.forward_passes == one.forward_passes and both.tokens == one.tokens
    assert f"ranks: skipped {one.skipped:.1%}, 0.0%" in both.text()
    assert both.to_dict()["ranks"] == both.ranks


def test_shares_are_means_of_the_ranks_that_know_them():
    one = summary(skipped_per_step=[0.0, 0.2, None, 0.4], layers={"double 0": [None, 0.2]})
    other = replace(one, skipped_per_step=[0.0, 0.4, None], layers={"double 0": [0.1, 0.4], "double 1": [None, 0.5]})
    both = merged([one, other])
    assert both.skipped_per_step == pytest.approx([0.0, 0.3, None, 0.4])
    assert both.layers["double 0"] == pytest.approx([0.1, 0.3]) and both.layers["double 1"] == [None, 0.5]


def test_notes_are_said_once_and_name_the_ranks_that_have_them():
    one = summary(notes=["all", "some"])
    three = [one, replace(one, notes=["all"]), replace(one, notes=["some", "all", "last"])]
    assert merged(three).notes == ["all", "rank 0, 2: some", "rank 2: last"]


def test_what_a_single_rank_has_not_reached_is_a_note_and_what_none_has_is_the_headline():
    one, off = summary(), summary(unreached="nothing came", sparse_calls=0, dense_calls={})
    assert "rank 1: nothing came" in merged([one, off]).notes and merged([one, off]).headline().startswith("on:")
    assert merged([off, off]).headline() == "off: nothing came" and not merged([off, off]).notes


def test_dense_calls_are_added_by_reason_and_environments_are_compared():
    one = summary(dense_calls={CROSS_ATTENTION: 3}, environment={"device": "A", "torch": "2"})
    other = replace(one, dense_calls={CROSS_ATTENTION: 3, OUT_OF_MEMORY: 1}, environment={"device": "B", "torch": "2"})
    both = merged([one, other])
    assert both.dense_calls == {CROSS_ATTENTION: 6, OUT_OF_MEMORY: 1}
    assert both.environment == {"device": "A, B", "torch": "2"}


def test_time_is_unknown_where_a_rank_has_not_timed():
    one = summary(saved=TimeSaved(6.0, 3.0, "the clock"))
    assert merged([one, replace(one, saved=None)]).saved is None


def test_a_summary_survives_the_way_to_another_process():
    one = summary(saved=TimeSaved(6.0, 3.0, "the clock"), dense_calls={CROSS_ATTENTION: 3})
    plain = to_plain(one)
    assert from_plain(plain) == one and len(LAYERS) == len(one.layers)
    assert not [value for value in plain.values() if "liteattention" in type(value).__module__]
    with pytest.raises(TypeError):
        from_plain({**plain, "of_a_later_version": 1})
