"""Report and Compare in a real ComfyUI with the tiny model."""

import gc
import json
import re
import types

import pytest
import torch

from liteattention.host import prompt, run_handle
from liteattention.kernels import SkipMask
from liteattention.nodes.apply import LiteAttention
from liteattention.nodes.report import LiteAttentionCompare, LiteAttentionReport

GRAPH = {"1": {"class_type": "LiteAttention", "inputs": {"model": ["9", 0]}},
         "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0]}},
         "3": {"class_type": "LiteAttentionReport",
               "inputs": {"model": ["2", 0], "samples": ["4", 0], "layers": "0, -1", "heads": "1"}}}


@pytest.fixture(autouse=True)
def node(monkeypatch):
    monkeypatch.setattr(LiteAttention, "hidden", types.SimpleNamespace(unique_id="1", prompt=GRAPH))
    monkeypatch.setattr(prompt, "running", lambda: None)


def patched(kit, **settings):
    return LiteAttention.execute(kit.model, -1.0, 1, min_tokens=128, **settings).args[0]


def test_before_a_run_and_without_the_node_it_says_what_to_connect(kit):
    with pytest.raises(ValueError, match="no LiteAttention on it; connect"):
        LiteAttentionReport.execute(kit.model, {"samples": None})
    with pytest.raises(ValueError, match="No sampling run of this model has finished"):
        LiteAttentionReport.execute(patched(kit), {"samples": None})


def test_a_run_is_reported(kit):
    model = patched(kit)
    samples = {"samples": kit.sample(model)}
    clone = model.clone()  # as by a node in between
    out = LiteAttentionReport.execute(clone, samples)
    passed, plot, summary, stats = out.args
    stats = json.loads(stats)
    assert passed is samples and plot.shape == (1, 1200, 1600, 3) and out.ui.as_dict()["images"]
    summary = run_handle(model).summary
    assert stats["skipped"] == summary.skipped > 0.05 and stats["taken"] == summary.sparse_calls
    assert f"Skipped {summary.skipped * 100:.1f} %" in summary and "No masks" not in summary
    about = stats["environment"]
    assert about["model"] == "WanModel" and about["device"] == "cpu" and about["torch"] == torch.__version__
    assert all(re.match(r"\d+\.\d+", about[name]) for name in ("liteattention", "comfyui", "python", "triton"))
    assert f"torch {torch.__version__}" in summary
    assert not re.search(r"/\w+/|\\\\|safetensors", out.args[3]), "no path and no file name"
    assert len(stats["layers"]) == 5 and all(len(shares) == 4 for shares in stats["layers"].values())
    # Each layer's share of each step, weighed alike, is the step's.
    for step, share in enumerate(stats["skipped_per_step"]):
        values = [shares[step] for shares in stats["layers"].values() if shares[step] is not None]
        assert not values or sum(values) / len(values) == pytest.approx(share, abs=1e-3)


def test_the_masks_of_the_chosen_blocks_and_heads_are_kept_as_pictures(kit):
    model = patched(kit)
    kit.sample(model)
    pictures = run_handle(model).pictures
    assert [(p.layer, p.head) for p in pictures] == [("double 0", 1), ("double 4", 1)]
    for picture in pictures:
        assert picture.tiles == (6, 6) and picture.skipped.device.type == "cpu" and 0 <= picture.share < 1
        assert picture.share == pytest.approx(picture.skipped.float().mean().item() / 255, abs=2e-3)
        assert len(picture.frame_edges) == 8 and picture.frame_edges[-1] == pytest.approx(700 / 128)
    assert any(p.share > 0 for p in pictures)


def masks_alive():
    gc.collect()
    return sum(isinstance(x, SkipMask) for x in gc.get_objects())


def test_without_a_report_no_masks_are_kept_and_none_outlive_the_run(kit, monkeypatch):
    before = masks_alive()
    monkeypatch.setattr(LiteAttention, "hidden", types.SimpleNamespace(unique_id="1", prompt={"1": GRAPH["1"]}))
    model = patched(kit)
    kit.sample(model)
    assert run_handle(model).pictures == []
    assert "No masks were kept" in LiteAttentionReport.execute(model, {"samples": None}).args[2]
    assert masks_alive() <= before


def test_a_graph_leads_from_the_node_to_its_report():
    choice = prompt.wanted_masks(GRAPH, "1")
    assert choice.layers.holds(0, 5) and choice.layers.holds(4, 5) and not choice.layers.holds(2, 5)
    assert prompt.wanted_masks(GRAPH, "7") is None and prompt.wanted_masks({"1": GRAPH["1"]}, "1") is None
    wrong = {**GRAPH, "3": {**GRAPH["3"], "inputs": {**GRAPH["3"]["inputs"], "layers": "x"}}}
    assert not prompt.wanted_masks(wrong, "1").layers.holds(0, 5)


def test_numbers_that_cannot_be_read_stay_on_the_node():
    assert "heads" in LiteAttentionReport.validate_inputs(layers="0", heads="a")
    assert LiteAttentionReport.validate_inputs(layers="0-2, -1", heads=None) is True


def test_compare():
    dense = torch.rand(5, 32, 40, 3, generator=torch.Generator().manual_seed(0))
    strip, summary, stats = LiteAttentionCompare.execute(dense, dense * 0.98).args
    assert strip.shape[2:] == (1600, 3) and "PSNR" in summary and len(json.loads(stats)["psnr_db_per_frame"]) == 5
    with pytest.raises(ValueError, match="the two have to come from the same settings"):
        LiteAttentionCompare.execute(dense, dense[:, :16])
