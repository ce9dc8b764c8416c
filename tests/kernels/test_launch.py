"""The launch table: which configuration runs where, and what a configuration may be; overrides and tuning."""

import dataclasses

import pytest
import torch

from liteattention.kernels import DTYPES, HEAD_DIMS, TILE, break_even_density, launch_table, tune
from liteattention.kernels.launch_table import (
    CallKind,
    LaunchConfig,
    architecture,
    launch_config,
    store_tuned,
    table_config,
)

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "cpu"]
KIND = CallKind("sm_89", 128, torch.bfloat16, True, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No override, no tuned file of whoever runs the tests, and nothing remembered."""
    monkeypatch.setenv("LITEATTENTION_CACHE", str(tmp_path))
    monkeypatch.delenv(launch_table.LAUNCH_ENV, raising=False)
    launch_table._launch_config.cache_clear()
    yield
    launch_table._launch_config.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_every_call_that_is_served_has_a_launch(arch, head_dim, dtype, recording, int8):
    config = launch_config(CallKind(arch, head_dim, dtype, recording, int8))
    assert TILE % config.BLOCK_M == TILE % config.BLOCK_N == 0
    assert min(config.BLOCK_M, config.BLOCK_N) >= 16, "tl.dot takes no less"
    assert not config.tma or arch in ("sm_90", "sm_100")
    assert not config.pv_fp16 or int8


@pytest.mark.parametrize("bad, says", [({"BLOCK_M": 96}, "divide 128"), ({"BLOCK_N": 256}, "divide 128"),
                                       ({"record": 2}, "record is 1 or 3"),
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


def test_the_environment_changes_what_it_names(monkeypatch):
    monkeypatch.setenv(launch_table.LAUNCH_ENV, "BLOCK_N=32, num_stages=3,branch=0")
    assert launch_config(KIND) == dataclasses.replace(table_config(KIND), BLOCK_N=32, num_stages=3, branch=False)
    monkeypatch.delenv(launch_table.LAUNCH_ENV)
    assert launch_config(KIND) == table_config(KIND)


@pytest.mark.parametrize("text, says", [("BLOCK_K=3", "BLOCK_K=3.*allowed.*BLOCK_M, BLOCK_N"), ("BLOCK_N", "'BLOCK_N'"),
                                        ("num_warps=four", "num_warps=four"), ("BLOCK_N=96", "divide 128")])
def test_a_wrong_environment_is_named(monkeypatch, text, says):
    monkeypatch.setenv(launch_table.LAUNCH_ENV, text)
    with pytest.raises(ValueError, match=says):
        launch_config(KIND)


def test_tuned_configurations_are_kept_used_and_merged(tmp_path, monkeypatch):
    mine, other = LaunchConfig(BLOCK_N=32), dataclasses.replace(KIND, head_dim=64)
    assert store_tuned({KIND.key: mine}) == tmp_path / "launch.json"
    store_tuned({other.key: LaunchConfig(num_warps=4)})
    assert launch_config(KIND) == mine and launch_config(other).num_warps == 4
    assert launch_config(dataclasses.replace(KIND, recording=False)) == table_config(KIND), "other kinds: the table"
    monkeypatch.setenv(launch_table.LAUNCH_ENV, "num_stages=1")
    assert launch_config(KIND) == dataclasses.replace(mine, num_stages=1), "the environment has the last word"


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"sm_89 d128 bfloat16 full record": {"BLOCK_N": 96}}',
                                  '{"sm_89 d128 bfloat16 full record": {"unknown": 1}}'])
def test_a_spoiled_file_is_left_to_the_table(tmp_path, text):
    (tmp_path / "launch.json").write_text(text)
    assert launch_config(KIND) == table_config(KIND)


def test_tuning_keeps_the_table_unless_something_is_clearly_faster(capsys):
    table = table_config(KIND)
    configs = tune.candidates(table, False)
    assert configs[0] == table and len(configs) == len(set(configs)) > 10
    assert tune.choose(configs, lambda config: 1.0 if config == table else 0.98)[0] == table
    wanted = configs[7]

    def measure(config):
        if config.num_warps == 4:
            raise RuntimeError("out of resource: shared memory")
        return 0.9 if config == wanted else 1.0

    assert wanted.num_warps != 4
    best, times = tune.choose(configs, measure)
    assert best == wanted and all(config.num_warps == 8 for config in times)
    assert "left out" in capsys.readouterr().out


def test_int8_candidates_stay_within_float16():
    kind = dataclasses.replace(KIND, int8=True)
    assert all(config.BLOCK_N <= 64 for config in tune.candidates(table_config(kind), True))


def test_the_command_says_that_there_is_no_gpu(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    done = subprocess.run([sys.executable, str(Path(tune.__file__))], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and "no GPU" in done.stderr
