"""The masks that are timed: exact density, diagonal, skewed heads, bands."""

import pytest
import torch
from support.masks import head_densities, realistic_bits


@pytest.mark.parametrize("tokens", [2048, 5000, 8192])
@pytest.mark.parametrize("sparsity", [0.0, 0.21, 0.42, 0.57, 0.77])
def test_density_is_hit_and_the_diagonal_stays(tokens, sparsity):
    bits = realistic_bits(6, tokens, sparsity)
    n = -(-tokens // 128)
    assert bits.shape == (1, 6, n, n) and bits.dtype == torch.bool
    assert abs(1 - bits.float().mean().item() - sparsity) < 0.005
    assert bits.diagonal(dim1=-2, dim2=-1).all()


def test_heads_differ_much():
    density = realistic_bits(24, 8192, 0.57).float().mean((0, 2, 3))
    assert density.min() < 0.15 < 0.75 < density.max()
    assert not density.sort().values.equal(density), "neighbouring heads would share their load"


def test_what_is_near_and_what_is_a_frame_away_is_kept_more_often():
    n, frames = 63, 21
    bits = realistic_bits(24, 128 * n, 0.57, frames=frames)[0].float().mean(0)
    at = {d: bits.diagonal(d).mean().item() for d in range(12)}
    assert at[1] > at[4] + 0.05
    assert at[3] > at[4] + 0.02 and at[6] > at[7] + 0.02  # a frame is 3 tiles long


def test_same_seed_same_mask():
    assert realistic_bits(4, 2048, 0.5, seed=3).equal(realistic_bits(4, 2048, 0.5, seed=3))
    assert not realistic_bits(4, 2048, 0.5, seed=3).equal(realistic_bits(4, 2048, 0.5, seed=4))


def test_no_room_for_the_diagonal_is_said():
    with pytest.raises(ValueError, match="sparsity is 0.99; 8 x 8 tiles"):
        realistic_bits(2, 1024, 0.99)


@pytest.mark.parametrize("density", [0.1, 0.43, 0.79, 1.0])
def test_head_densities_have_the_mean(density):
    values = head_densities(40, density, 0.02)
    assert abs(sum(values) / 40 - density) < 1e-6 and min(values) >= 0.02 and max(values) <= 1
