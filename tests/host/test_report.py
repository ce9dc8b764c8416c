"""Report and Compare in a real ComfyUI with the tiny model."""

import json
import re
import types

import pytest
import torch

from liteattention.host import run_handle
from liteattention.nodes import report
from liteattention.nodes.apply import LiteAttention
from liteattention.nodes.report import LiteAttentionCompare, LiteAttentionReport


@pytest.fixture(autouse=True)
def node(monkeypatch):
    monkeypatch.setattr(LiteAttention, "hidden", types.SimpleNamespace(unique_id="1", dynprompt=None))


def patched(kit):
    return LiteAttention.execute(kit.model, {"rule": "threshold", "threshold": -1.0}, 1, min_tokens=128).args[0]


def test_before_a_run_and_without_the_node_it_says_off_and_passes_the_latent_on(kit):
    samples = {"samples": torch.zeros(1)}
    for model, why in ((kit.model, "the model has no LiteAttention on it (bypassed or not connected)"),
                       (patched(kit), "no sampling run of this model has finished; connect the latent")):
        out = LiteAttentionReport.execute(model, samples)
        passed, plot, text, stats = out.args
        assert passed is samples and text.startswith(f"off: {why}") and "\n" not in text
        assert plot.shape == (1, 1200, 1600, 3) and plot.std() > 0.005 and out.ui.as_dict()["images"]
        assert json.loads(stats)["headline"].startswith(f"off: {why}")


def test_a_run_is_reported(kit):
    model = patched(kit)
    samples = {"samples": kit.sample(model)}
    clone = model.clone()  # as by a node in between
    out = LiteAttentionReport.execute(clone, samples)
    passed, plot, text, stats = out.args
    stats = json.loads(stats)
    assert passed is samples and plot.shape == (1, 1200, 1600, 3) and out.ui.as_dict()["images"]
    summary = run_handle(model).summary
    assert stats["skipped"] == summary.skipped > 0.05 and stats["sparse_calls"] == summary.sparse_calls
    assert text.startswith(f"on: {summary.skipped:.1%} of attention skipped") and "20 cross-attention calls" in text
    about = stats["environment"]
    assert about["model"] == "WanModel" and about["device"] == "cpu" and about["torch"] == torch.__version__
    assert all(re.match(r"\d+\.\d+", about[name]) for name in ("liteattention", "comfyui", "python", "triton"))
    assert f"torch {torch.__version__}" in text
    assert not re.search(r"/\w+/|\\\\|safetensors", out.args[3]), "no path and no file name"
    assert len(stats["layers"]) == 5 and all(len(shares) == 4 for shares in stats["layers"].values())
    # Each layer's share of each step, weighed alike, is the step's.
    for step, share in enumerate(stats["skipped_per_step"]):
        values = [shares[step] for shares in stats["layers"].values() if shares[step] is not None]
        assert not values or sum(values) / len(values) == pytest.approx(share, abs=1e-3)


def test_the_masks_of_the_chosen_blocks_and_heads_are_drawn(kit, monkeypatch):
    model, drawn = patched(kit), []
    samples = {"samples": kit.sample(model)}
    monkeypatch.setattr(report, "draw_run", lambda stats, pictures: drawn.extend(pictures) or torch.zeros(1, 8, 8, 3))
    LiteAttentionReport.execute(model, samples, layers="0, -1", heads="1")
    assert [(p.layer, p.head) for p in drawn] == [("double 0", 1), ("double 4", 1)]
    for picture in drawn:
        assert picture.tiles == (6, 6) and picture.skipped.device.type == "cpu" and 0 <= picture.share < 1
        assert picture.share == pytest.approx(picture.skipped.float().mean().item() / 255, abs=2e-3)
        assert len(picture.frame_edges) == 8 and picture.frame_edges[-1] == pytest.approx(700 / 128)
    assert any(p.share > 0 for p in drawn)


def test_numbers_that_cannot_be_read_stay_on_the_node():
    assert "heads" in LiteAttentionReport.validate_inputs(layers="0", heads="a")
    assert LiteAttentionReport.validate_inputs(layers="0-2, -1", heads=None) is True


def test_compare():
    dense = torch.rand(5, 32, 40, 3, generator=torch.Generator().manual_seed(0))
    strip, summary, stats = LiteAttentionCompare.execute(dense, dense * 0.98).args
    assert strip.shape[2:] == (1600, 3) and "PSNR" in summary and len(json.loads(stats)["psnr_db_per_frame"]) == 5
    with pytest.raises(ValueError, match="the two have to come from the same settings"):
        LiteAttentionCompare.execute(dense, dense[:, :16])
