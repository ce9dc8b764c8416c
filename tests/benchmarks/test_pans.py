"""The second model of the quality lab: the clips it was trained on, its file, and its training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.quality_cases import MODELS

from liteattention.benchmarks.demo_pipeline.pans import SPEEDS, clip, prompt_tokens
from liteattention.benchmarks.demo_pipeline.wan import load_tiny_wan
from liteattention.demo.pixels import decode

TRAIN = Path(__file__).resolve().parents[2] / "benchmarks" / "demo_pipeline" / "train.py"


def painted(prompt, seed=0, size=(3, 16, 16)):
    return clip(prompt, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("direction, axis, sign", [(0, 2, -1), (1, 1, -1), (2, 2, 1), (3, 1, 1)])
def test_the_picture_moves_against_the_camera(direction, axis, sign):
    frames = decode(painted((2, direction, 1, 0))[None])
    assert frames.shape == (3, 32, 32, 3)

    def error(shift):
        moved = frames[0].roll(round(shift), axis - 1)
        inner = (slice(6, -6), slice(6, -6))
        return (moved[inner] - frames[1][inner]).square().mean()

    assert error(sign * SPEEDS[1]) < 0.5 * min(error(0), error(-sign * SPEEDS[1]))


def test_a_disc_is_where_the_prompt_asks_for_one():
    with_disc, without = (painted((0, 0, 0, disc), size=(1, 16, 16)) for disc in (1, 0))
    changed = (with_disc != without).float().mean()
    assert 0.02 < changed < 1 and torch.equal(without, painted((0, 0, 0, 0), size=(1, 16, 16)))


def test_the_file_restores_what_noise_hides():
    """Other heads and depth than the demo model, and trained: half noise, half a clip it has never seen."""
    model = load_tiny_wan(MODELS["pans"])
    assert (model.config.num_heads, model.config.head_dim, model.config.num_layers) == (3, 64, 6)
    assert MODELS["pans"].stat().st_size < 7 * 2**20
    prompt = (0, 0, 1, 0)
    clean = painted(prompt, 7, (5, 16, 16))[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    noisy = (clean + noise) / 2
    with torch.inference_mode():
        restored = noisy - 0.5 * model(noisy, torch.tensor([500.0]), prompt_tokens(*prompt))
    assert (restored - clean).square().mean() < 0.1 * clean.var()


def test_training_writes_a_model_that_loads(tmp_path):
    path = tmp_path / "m.safetensors"
    subprocess.run([sys.executable, "-W", "ignore", TRAIN, "--steps", "1", "--out", path], check=True, timeout=180,
                   capture_output=True)
    model = load_tiny_wan(path)
    assert model.config.head_dim == 64 and all(torch.isfinite(p).all() for p in model.parameters())
