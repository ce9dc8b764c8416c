"""Temporal error of known clips."""

import pytest
import torch

from liteattention.report.temporal import motion


def test_a_constant_change_moves_nothing():
    dense = torch.rand(4, 8, 8, 3, generator=torch.Generator().manual_seed(0)) / 2
    found = motion(dense, dense + 0.25)
    assert found["motion_psnr_db"] is None or found["motion_psnr_db"] > 120
    assert found["quiet_motion"] == pytest.approx(0, abs=1e-5)


def test_flicker_shows_in_the_quiet_quarter():
    dense = torch.zeros(3, 8, 8, 3)
    dense[:, :4] = torch.tensor([0.0, 0.5, 0.0]).view(3, 1, 1, 1)
    dense[:, 4:] = torch.tensor([0.0, 0.1, 0.0]).view(3, 1, 1, 1)
    lite = dense.clone()
    lite[1, 4:] += 0.1  # a quarter of the pixels' motion doubles in the lower half, which moves less
    found = motion(dense, lite)
    assert found["quiet_motion"] == pytest.approx(1.0)
    assert found["motion_psnr_db"] == pytest.approx(10 * torch.log10(torch.tensor(1 / (0.1 ** 2 / 2))).item(), abs=1e-3)


def test_one_frame_or_nothing_that_moves():
    assert motion(torch.zeros(1, 4, 4, 3), torch.ones(1, 4, 4, 3)) == {"motion_psnr_db": None, "quiet_motion": None}
    assert motion(torch.zeros(2, 4, 4, 3), torch.zeros(2, 4, 4, 3))["quiet_motion"] is None
