"""Clips that the demo model is trained on."""

import pytest
import torch

from liteattention.benchmarks.demo_pipeline.shapes import SPEEDS, batch, clip, encode
from liteattention.demo.pixels import decode, prompt_tokens

SIZE = (5, 16, 20)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_is_encoded_is_decoded():
    pixels = 2 * torch.rand(3, 2, 6, 10, generator=generator()) - 1
    latent = encode(pixels)
    assert latent.shape == (16, 2, 3, 5)
    torch.testing.assert_close(decode(latent[None]), (pixels.permute(1, 2, 3, 0) + 1) / 2)
    assert latent[12:].abs().max() > 0.1, "and the luma besides"


def test_a_clip_stays_within_the_colours():
    for shape in range(2):
        latent = clip(shape, 4, 2, SIZE, generator(shape))
        assert latent.shape == (16, *SIZE) and latent[:12].abs().max() < 1.6 * 1.2


@pytest.mark.parametrize("speed", range(3))
def test_faster_shapes_change_more(speed):
    def change(which):
        frames = decode(clip(0, 2, which, SIZE, generator(3))[None])
        return (frames[1:] - frames[:-1]).abs().mean()

    assert SPEEDS == tuple(sorted(SPEEDS))
    if speed:
        assert change(speed) > 1.1 * change(speed - 1)
    else:
        assert change(0) > 0


def test_more_shapes_cover_more():
    """Shapes are more saturated than the ground; squares of one size are larger than discs."""
    def covered(shape, count):
        clips = [decode(clip(shape, count, 0, SIZE, generator(seed))[None]) for seed in range(6)]
        return torch.stack([(x.amax(-1) - x.amin(-1) > 0.5).float().mean() for x in clips]).mean()

    counts = [covered(0, count) for count in range(1, 5)]
    assert counts == sorted(counts) and counts[3] > 2 * counts[0]
    assert covered(1, 2) > covered(0, 2)


def test_a_batch_has_its_prompts():
    clips, prompts = batch(3, SIZE, generator(5))
    assert clips.shape == (3, 16, *SIZE) and prompts.shape == (3, 4, 4096)
    known = [prompt_tokens(s, c, v) for s in range(2) for c in range(1, 5) for v in range(3)]
    assert all(any(torch.equal(prompt, x[0]) for x in known) for prompt in prompts)
    again, _ = batch(3, SIZE, generator(5))
    assert torch.equal(clips, again), "the seed fixes them"
