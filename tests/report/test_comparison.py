"""Two clips of the same seed side by side: PSNR and SSIM by their formulae, whatever the size."""

import math

import pytest
import torch

from liteattention.report import compare_clips
from liteattention.report.comparison import frame_psnr, frame_ssim


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
    assert ("Motion from frame to frame" in summary) == (frames > 1)
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
