"""The launch table: which configuration runs where, and what a configuration may be."""

import pytest
import torch

from liteattention.kernels import DTYPES, HEAD_DIMS, TILE
from liteattention.kernels.launch import LaunchConfig, architecture, launch_config


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_call_that_is_served_has_a_launch(arch, head_dim, dtype):
    config = launch_config(arch, head_dim, dtype)
    assert TILE % config.BLOCK_M == TILE % config.BLOCK_N == 0
    assert min(config.BLOCK_M, config.BLOCK_N) >= 16, "tl.dot takes no less"


@pytest.mark.parametrize("bad", [{"BLOCK_M": 96}, {"BLOCK_N": 256}, {"record": 2}])
def test_a_launch_that_would_change_what_a_mask_bit_means_is_refused(bad):
    with pytest.raises(ValueError, match="BLOCK_M and BLOCK_N divide 128, record is 1 or 3"):
        LaunchConfig(**bad)


def test_architectures_are_named():
    assert architecture(torch.device("cpu")) == "cpu"
