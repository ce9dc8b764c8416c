"""Masks at another size of the video, against a search token by token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liteattention.kernels import TILE, SkipMask, tiles
from liteattention.runtime.resize import resize
from liteattention.runtime.video_tokens import Grid

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))


def overlaps(i, new, j, old):
    """Whether part i of `new` equal parts of an axis lies over part j of `old`."""
    return i * old < (j + 1) * new and j * new < (i + 1) * old


def tiles_of_tokens(grid, seqlen):
    """{(frame, row, column) or None for a token beside the grid: tiles with such tokens}."""
    found = {}
    for token in range(seqlen):
        place, at = None, token - grid.offset
        if grid.offset <= token < grid.stop:
            place = at // (grid.rows * grid.columns), at // grid.columns % grid.rows, at % grid.columns
        found.setdefault(place, set()).add(token // TILE)
    return found


def oracle(bits, before, seqlen_before, after, seqlen):
    old, new = tiles_of_tokens(before, seqlen_before), tiles_of_tokens(after, seqlen)
    count = tiles(seqlen)
    covering = [set() for _ in range(count)]
    for place, (tile,) in ((place, at) for place, at in new.items() if place is not None):
        for other, (source,) in ((place, at) for place, at in old.items() if place is not None):
            if all(map(overlaps, place, after[1:], other, before[1:])):
                covering[tile].add(source)
    expected = torch.zeros(count, count, dtype=torch.bool)
    for q in range(count):
        for k in range(count):
            expected[q, k] = any(bits[a, b] for a in covering[q] for b in covering[k])
    for tile in new.get(None, ()):
        expected[tile] = expected[:, tile] = True
    return expected


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.tuples(*[st.integers(0, 200)] * 4), st.integers(0, 2**31))
def test_a_tile_is_active_where_any_tile_that_covers_its_tokens_is(small, large, extra, seed):
    before, after = Grid(extra[0], *small), Grid(extra[1], *large)
    seqlen_before, seqlen = before.stop + extra[2], after.stop + extra[3]
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(1, 2, tiles(seqlen_before), tiles(seqlen_before), generator=generator) < 0.3
    mask = SkipMask.from_bool(bits, seqlen_before, seqlen_before)
    mask.passes = [3]
    out = resize(mask, before, after, seqlen)
    assert (out.seqlen_q, out.seqlen_k, out.passes) == (seqlen, seqlen, [3])
    for head in range(2):
        assert torch.equal(out.head_bits(0, head), oracle(bits[0, head], before, seqlen_before, after, seqlen))


def test_there_and_back_loses_no_active_tile():
    small, large = Grid(0, 4, 8, 16), Grid(40, 4, 16, 32)
    bits = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    there = resize(SkipMask.from_bool(bits, 512, 512), small, large, 40 + 2048)
    back = resize(there, large, small, 512).to_bool()
    assert torch.equal(back & bits, bits)
