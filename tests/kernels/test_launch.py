"""The launch table: which configuration runs where, and what a configuration may be."""

import pytest
import torch

from liteattention.kernels import DTYPES, HEAD_DIMS, TILE, break_even_density, forms, launch_table
from liteattention.kernels.launch_table import LaunchConfig, architecture, launch_config

ARCHITECTURES = [*forms.NVIDIA, *forms.AMD, "cpu"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("int8", [False, True])
def test_every_call_that_is_served_has_a_launch(arch, head_dim, dtype, int8):
    config = launch_config(arch, head_dim, dtype, int8)
    assert TILE % config.BLOCK_M == TILE % config.BLOCK_N == 0
    assert min(config.BLOCK_M, config.BLOCK_N) >= 16, "tl.dot takes no less"
    assert not config.tma or arch in ("sm_90", "sm_100", "sm_103")
    assert not config.pv_fp16 or int8


@pytest.mark.parametrize("bad, says", [({"BLOCK_M": 96}, "divide 128"), ({"BLOCK_N": 256}, "divide 128"),
                                       ({"BLOCK_N": 128, "pv_fp16": True}, "BLOCK_N is at most 64")])
def test_a_launch_that_would_change_what_a_mask_bit_means_or_overflow_is_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        LaunchConfig(**bad)


def test_architectures_are_named():
    assert architecture(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_75"])
def test_break_even_is_a_share(monkeypatch, arch):
    monkeypatch.setattr(launch_table, "architecture", lambda device: arch)
    assert 0 < break_even_density(torch.device("cuda"), 128, torch.bfloat16) <= 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_forms_are_those_that_any_settings_launch(arch):
    """Defaults first, then one change, then all; every head size, dtype, rule; INT8 where `precision_choice` has it."""
    every, near, default = forms.launchable(arch), forms.near_defaults(arch), forms.default_forms(arch)
    assert set(default[:1]) <= set(near) <= set(every) and set(default) <= set(near)
    assert len({form.name for form in every}) == len(every)
    assert {form.head_dim for form in near} == set(HEAD_DIMS) and {form.dtype for form in near} == set(DTYPES)
    assert {form.criterion for form in default} == {"mass", "max"} and all(form.pool_skipped for form in default)
    assert any(form.int8 for form in default) == launch_table.is_geforce(arch)
    assert any(form.int8 for form in every) == (not arch.startswith("gfx") and arch not in ("sm_100", "sm_103"))
    assert not any(form.int8 and form.dtype == torch.float32 for form in every)
    assert {(form.pool_skipped, form.ragged) for form in near} >= {(True, False), (False, True)}
