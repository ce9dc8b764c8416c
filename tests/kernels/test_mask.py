"""The bit layout, the lifecycle of a mask, must-keep ranges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liteattention.kernels import TILE, MustKeep, SkipMask, mask_nbytes, mask_shape, tiles
from liteattention.kernels.mask import pack_bits, popcount, unpack_words

lengths = st.integers(1, 9000)


@given(st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_bits_survive_packing(n, seed):
    bits = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-n // 32))
    assert torch.equal(unpack_words(words, n), bits)
    assert popcount(words) == bits.sum()


@given(st.integers(0, 299))
def test_bit_t_is_bit_t_and_31_of_word_t_shift_5(t):
    bits = torch.zeros(300, dtype=torch.bool)
    bits[t] = True
    words = pack_bits(bits).tolist()
    expected = [0] * 10
    expected[t >> 5] = 1 << (t & 31) if t & 31 != 31 else -(2**31)
    assert words == expected


@given(lengths, lengths)
def test_a_full_mask_has_exactly_its_tiles(n_q, n_k):
    mask = SkipMask.full(1, 2, n_q, n_k)
    assert tuple(mask.words.shape) == mask_shape(1, 2, n_q, n_k) == (1, 2, tiles(n_q), -(-tiles(n_k) // 32))
    assert mask.active_tiles() == mask.total_tiles == 2 * tiles(n_q) * tiles(n_k)
    assert mask.density() == 1 and mask.to_bool().all()
    assert mask.nbytes == mask_nbytes(1, 2, n_q, n_k) == mask.words.numel() * 4
    assert unpack_words(mask.words, mask.words.shape[-1] * 32)[..., tiles(n_k):].sum() == 0, "bits past the end are 0"


@given(lengths, lengths, st.floats(0, 1), st.integers(0, 99))
def test_from_bool_and_density(n_q, n_k, density, seed):
    bits = torch.rand(2, 1, tiles(n_q), tiles(n_k), generator=torch.Generator().manual_seed(seed)) < density
    mask = SkipMask.from_bool(bits, n_q, n_k)
    assert torch.equal(mask.to_bool(), bits)
    assert mask.density() == pytest.approx(bits.double().mean().item())


def test_reset_clone_and_moves_are_independent():
    mask = SkipMask.from_bool(torch.zeros(2, 1, 3, 40, dtype=torch.bool), 300, 40 * TILE)
    mask.passes = [3, 4]
    copies = [mask.clone(), mask.to("cpu")]
    mask.reset()
    assert mask.density() == 1 and mask.passes == [0, 0]
    for copy in copies:
        assert copy.density() == 0 and copy.passes == [3, 4]


def test_what_a_mask_hands_out_is_its_own():
    """Neither the list of passes nor the bits given in are shared with anyone."""
    passes, bits = [1, 2], torch.ones(2, 1, 3, 3, dtype=torch.bool)
    given = SkipMask(SkipMask.full(2, 1, 300).words, 300, 300, passes)
    copy = given.clone()
    given.passes[0] = 9
    assert passes == [1, 2] and copy.passes == [1, 2]
    mask = SkipMask.from_bool(bits, 300, 300)
    bits.zero_()
    mask.to_bool().zero_()
    assert mask.density() == 1


def test_reset_works_in_place():
    """Words are addressed by kernels and shared with views: they never move."""
    mask = SkipMask.from_bool(torch.zeros(1, 1, 2, 70, dtype=torch.bool), 200, 70 * TILE)
    words = mask.words
    mask.reset()
    assert mask.words is words and words[0, 0, 0].tolist() == [-1, -1, (1 << 6) - 1]


def test_masks_can_be_updated_outside_inference_mode():
    with torch.inference_mode():
        masks = [SkipMask.full(1, 1, 300), SkipMask.from_bool(torch.ones(1, 1, 3, 3, dtype=torch.bool), 300, 300)]
        masks += [masks[0].clone(), masks[0].to("cpu")]
    for mask in masks:
        assert not mask.words.is_inference()
        mask.words &= 0


def test_words_of_another_shape_or_dtype_are_refused():
    words = SkipMask.full(1, 2, 300).words
    for bad in (words.long(), words[0], words[..., :0], torch.zeros(1, 2, 4, 1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="contiguous int32"):
            SkipMask(bad, 300, 300)
    with pytest.raises(ValueError, match="bits is"):
        SkipMask.from_bool(torch.ones(1, 1, 3, 4, dtype=torch.bool), 300, 300)


def test_too_many_keys_for_a_tile_number():
    with pytest.raises(ValueError, match="tile number"):
        SkipMask.full(1, 1, 1, 32768 * TILE, device="meta")
    assert SkipMask.full(1, 1, 1, 32767 * TILE, device="meta").words.shape[-1] == 1024


def test_sizes_come_from_the_numbers_alone():
    """Far beyond 2^31, and without a byte allocated."""
    n = 4_000_000
    assert mask_shape(2, 48, n, n) == (2, 48, 31250, 977)
    assert mask_nbytes(2, 48, n, n) == 4 * 2 * 48 * 31250 * 977 > 2**33
    mask = SkipMask.full(2, 48, n, device="meta")
    assert mask.nbytes == mask_nbytes(2, 48, n, n) and mask.total_tiles == 2 * 48 * 31250 * 31250
    assert SkipMask.full(2, 3, 300).to("meta").words.shape == (2, 3, 3, 1)


def test_wan_14b_at_720p_needs_at_most_75_mb_per_batch_row():
    """81 frames of 1280 x 720 are 21 x 45 x 80 tokens; 40 layers of 40 heads."""
    needed = 40 * mask_nbytes(1, 40, 21 * 45 * 80, 21 * 45 * 80)
    assert 21 * 45 * 80 == 75_600
    assert needed == 40 * 40 * 591 * 19 * 4 <= 75e6


@given(st.lists(st.integers(-2**31, 2**31 - 1), min_size=1, max_size=8))
def test_popcount_of_any_words(words):
    """An int64 total: 2^31 active tiles are within reach of a long video."""
    count = popcount(torch.tensor(words, dtype=torch.int32))
    assert count.dtype == torch.int64 and count == sum((w & (2**32 - 1)).bit_count() for w in words)


@given(st.integers(1, 3000), st.data())
def test_must_keep_covers_every_tile_it_touches_and_no_other(n, data):
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    touched = {t // TILE for t in (start, stop - 1)}
    expected = [min(touched) <= t <= max(touched) for t in range(tiles(n))]
    assert MustKeep(keys=((start, stop),)).tile_mask(1, n)[0].tolist() == expected
    assert MustKeep(queries=((start, stop),)).tile_mask(n, 1)[:, 0].tolist() == expected


@given(st.integers(300, 3000), st.data())
def test_must_keep_ranges_add_up(n, data):
    """Keys mark columns, queries mark rows; several ranges are the union of each alone; none keeps nothing."""
    ends = st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda x: x[0] < x[1])
    keys, queries = data.draw(st.lists(ends, max_size=3)), data.draw(st.lists(ends, max_size=3))
    union = torch.zeros(tiles(n), tiles(n), dtype=torch.bool)
    for span in keys:
        union |= MustKeep(keys=(span,)).tile_mask(n, n)
    for span in queries:
        union |= MustKeep(queries=(span,)).tile_mask(n, n)
    assert torch.equal(MustKeep(tuple(keys), tuple(queries)).tile_mask(n, n), union)
    assert not MustKeep().tile_mask(n, n).any()


@pytest.mark.parametrize("span", [(5, 5), (6, 5), (-1, 5), (0, 301)])
@pytest.mark.parametrize("name", ["keys", "queries"])
def test_bad_ranges_name_themselves(name, span):
    with pytest.raises(ValueError, match=rf"must_keep.{name} holds"):
        MustKeep(**{name: (span,)}).tile_mask(300, 300)
