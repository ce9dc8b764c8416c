"""Pictures and texts about runs: whatever a run did, there is a legible picture."""

import math

import pytest
import torch

from liteattention.report import compare_clips, draw_run, run_summary
from liteattention.report.canvas import Canvas, viridis
from liteattention.report.comparison import frame_psnr, frame_ssim
from liteattention.runtime.receipt import Receipt
from liteattention.runtime.savings import Saved
from liteattention.runtime.snapshot import MaskPicture


def receipt(steps=4, layers=3, **changes):
    shares = [min(0.9, 0.1 * step) for step in range(steps)]
    return Receipt(**{
        "plan": "step 1 of 4 dense", "rule": "error_budget 0.1", "steps_done": steps, "total_steps": steps,
        "evaluations": steps, "taken": 3 * steps, "left": {"cross-attention": 2 * steps, "no mask bit": 1},
        "tiles_computed": 600, "tiles_total": 1000, "skipped_per_step": shares, "attention_seconds": None,
        "state_bytes": 12345, "tokens": 2304,
        "backend": "torch backend on cpu", "layers": {f"block {n}": list(shares) for n in range(layers)}} | changes)


def mask(rows=18, head=None, layer=0):
    skipped = (torch.arange(rows * rows).view(rows, rows) % 256).to(torch.uint8)
    edges = tuple(x * 2.0 for x in range(rows // 2 + 1))
    return MaskPicture(f"block {layer}", head, 12, skipped, (rows, rows), 0.5, edges)


@pytest.mark.parametrize("steps, layers", [(0, 0), (1, 1), (4, 3), (20, 40), (1000, 60)])
@pytest.mark.parametrize("masks", [0, 1, 8])
def test_any_run_has_a_picture(steps, layers, masks):
    stats = receipt(steps, layers, left={f"a reason that is long {'x' * 80} {n}": n + 1 for n in range(9)}).to_dict()
    panels = [mask(18 if n % 2 else 512, n, n // 2) for n in range(masks)]
    picture = draw_run(stats, panels)
    assert picture.shape == (1, 1200, 1600, 3) and picture.dtype == torch.float32
    assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.05
    assert picture.equal(draw_run(stats, panels))


def test_steps_and_layers_without_attention_have_a_look_of_their_own():
    stats = receipt(layers=1).to_dict()
    for changes in ({"skipped_per_step": [0.0, None, 0.2, 0.3]}, {"layers": {"block 0": [0.0, None, 0.2, 0.3]}}):
        assert not draw_run(stats | changes).equal(draw_run(stats))


def test_what_changes_in_a_run_changes_the_picture():
    usual = draw_run(receipt().to_dict(), [mask()])
    for changes in ({"taken": 1}, {"left": {}}, {"skipped_per_step": [0.5] * 4}, {"state_bytes": 2**28}):
        assert not draw_run(receipt(**changes).to_dict(), [mask()]).equal(usual), changes
    assert not draw_run(receipt().to_dict(), [mask(20)]).equal(usual)


def test_the_summary_says_what_the_receipt_says():
    text = run_summary(receipt(notes=["a note"], refreshed=200, came_back=10).to_dict())
    for part in ("Skipped 40.0 %", "12 of 21 attention calls", "8 cross-attention", "error_budget 0.1", "Note: a note",
                 "5.0 % of 200", "No masks were kept"):
        assert part in text, part
    assert "No masks" not in run_summary(receipt().to_dict(), [mask()])


def test_a_timed_run_says_how_fast_it_was():
    stats = receipt(seconds=10.0, saved=Saved.of(12.0, 7.0, "timed calls"), previous="attention_pytorch").to_dict()
    text = run_summary(stats)
    assert "Sampling took 10.0 s instead of about 15.0 s (1.50x); attention is 80 % of that." in text
    assert "7.00 s instead of 12.00 s" in text and "computed by attention_pytorch" in text
    untimed = receipt(seconds=10.0, saved=Saved(0.4)).to_dict()
    assert "Sampling took" not in run_summary(untimed) and "about 40 %" in run_summary(untimed)
    assert not draw_run(stats).equal(draw_run(untimed))


def test_texts_are_clipped_and_never_fail():
    canvas = Canvas(300, 40)
    assert canvas.text_size(canvas.clipped("word " * 99, 20, 120), 20)[0] <= 120
    canvas.text(0, 20, "\u4e2d\u6587 \u2192 \U0001f600 " * 20, 20, width=280)
    assert canvas.tensor().shape == (1, 40, 300, 3)


def test_colours_run_from_dark_to_light():
    light = viridis(torch.linspace(0, 1, 64).numpy()) @ [0.2126, 0.7152, 0.0722]
    assert (light[1:] > light[:-1] - 2).all() and light[-1] - light[0] > 120


def clips(frames=5, height=48, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(frames, height, width, 3, generator=generator)
    return dense, (dense + 0.05 * torch.randn(dense.shape, generator=generator)).clamp(0, 1)


def plain_ssim(x, y):
    """Wang et al. 2004 by its formula, window by window, one frame and colour."""
    at = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-at.square() / 4.5)
    weight = torch.outer(line, line) / line.sum() ** 2
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (t[i:i + 11, j:j + 11].double() for t in (x, y))
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            cov = (weight * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    return torch.stack(found).mean().item()


def test_psnr_and_ssim_against_their_formulae():
    dense, lite = clips(2, 16, 20)
    for t, value in enumerate(frame_psnr(dense, lite)):
        assert value == pytest.approx(-10 * math.log10((dense[t] - lite[t]).double().square().mean().item()))
    expected = sum(plain_ssim(dense[0, ..., c], lite[0, ..., c]) for c in range(3)) / 3
    assert frame_ssim(dense, lite)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("frames, height, width", [(1, 8, 8), (5, 48, 64), (81, 32, 16), (2, 200, 20)])
def test_any_pair_has_a_strip(frames, height, width):
    strip, summary, stats = compare_clips(*clips(frames, height, width))
    assert strip.dim() == 4 and strip.shape[0] == 1 and strip.shape[2:] == (1600, 3) and torch.isfinite(strip).all()
    assert stats["frames"] == frames == len(stats["ssim_per_frame"]) and f"over {frames} frames" in summary
    assert 20 < stats["psnr_db"] < 40 and stats["psnr_db_worst"] <= stats["psnr_db"] + 1e-6


def test_equal_and_unequal_clips():
    dense, lite = clips()
    _, summary, stats = compare_clips(dense, dense)
    assert "equal" in summary and stats["psnr_db"] is None and stats["ssim"] == pytest.approx(1.0)
    worse = lite.clone()
    worse[3] = 1 - dense[3]
    assert compare_clips(dense, worse)[2]["worst_frame"] == 3
    with pytest.raises(ValueError, match="dense has 5 frames of 64 x 48, lite has 4 frames of 64 x 48"):
        compare_clips(dense, lite[:4])
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_clips(dense[:0], lite[:0])
