"""The nodes for Raylight: what they ask of its workers, and what they say without any."""

import json
import sys

import pytest

from liteattention.host import run_handle
from liteattention.host.raylight.actors import NO_RAY
from liteattention.nodes import raylight
from liteattention.nodes.raylight import LiteAttentionRaylight, LiteAttentionRaylightReport
from liteattention.runtime import Threshold
from liteattention.runtime.merged_summary import merged

RULE = {"rule": "threshold", "threshold": -1.0}


def test_settings_go_to_the_workers_and_off_takes_them_back(monkeypatch):
    asked, actors = [], {"workers": [object()]}
    monkeypatch.setattr(raylight.raylight, "apply", lambda *given: asked.append(given))
    for enabled in (True, False):
        out = LiteAttentionRaylight.execute(actors, enabled, RULE, 1, min_tokens=128, dense_blocks="0",
                                            precision="full")
        assert out.args == (actors,)
    (on, config), (off, nothing) = asked
    assert on is off is actors and nothing is None
    assert (config.rule, config.warmup_steps, config.min_tokens) == (Threshold(-1.0), 1, 128)
    assert (config.dense_blocks, config.precision) == ("0", "full")


def test_a_value_that_cannot_be_read_is_an_error_on_the_node():
    assert "0-x" in LiteAttentionRaylight.validate_inputs("0-x", rule=RULE)
    assert LiteAttentionRaylight.validate_inputs("0-1", rule=RULE) is True


def test_the_report_is_that_of_all_ranks(kit, monkeypatch):
    model = kit.lite()
    samples = {"samples": kit.sample(model)}
    one = run_handle(model).summary
    monkeypatch.setattr(raylight.raylight, "last_run", lambda actors: merged([one, one]))
    passed, plot, text, stats = LiteAttentionRaylightReport.execute({"workers": [1, 2]}, samples).args
    stats = json.loads(stats)
    assert passed is samples and plot.shape == (1, 1200, 1600, 3)
    assert stats["sparse_calls"] == 2 * one.sparse_calls and stats["ranks"] == [one.skipped] * 2
    assert f"ranks: skipped {one.skipped:.1%}, {one.skipped:.1%}" in text


def test_without_ray_both_nodes_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for run in (lambda: LiteAttentionRaylight.execute({"workers": [1]}, True, RULE),
                lambda: LiteAttentionRaylightReport.execute({"workers": [1]}, {"samples": None})):
        with pytest.raises(RuntimeError) as raised:
            run()
        assert str(raised.value) == NO_RAY
