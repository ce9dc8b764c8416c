"""The tile lists' launch alone: mask bits become ordered lists of key tiles, and recording empties the mask."""

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import TILE, MustKeep, SkipMask, Workspace
from liteattention.kernels.mask import pack_bits

pytest.importorskip("triton", reason="Triton is not installed on this system")


@pytest.fixture
def tile_lists(monkeypatch, device):
    """Runs `triton_attention` with its second launch left out; gives each query tile's list of key tiles."""
    from liteattention.kernels import triton_launch

    def run(masks, n_q, n_k, heads=1, recording=False, must_keep=None):
        seen = []

        class Attention:
            def __getitem__(self, grid):
                return lambda **arguments: seen.append(arguments)

        monkeypatch.setattr(triton_launch, "attention_kernel", Attention())
        batch = len(masks)
        q, k = (torch.zeros(1, 1, 1, 64, dtype=torch.float16, device=device).expand(batch, heads, n, 64)
                for n in (n_q, n_k))
        rows = [(m, 0) for m in masks]
        backwards = [bool(m.passes[0] & 1) for m in masks]
        triton_launch.triton_attention(q, k, k, torch.empty_like(q), None, rows, backwards, -4.0, recording,
                                       must_keep, 0.125, Workspace(), None)
        (call,) = seen
        n_lists = batch * heads * -(-n_q // TILE)
        lists = call["lists_ptr"][:n_lists * -(-n_k // (16 * TILE)) * 16].view(n_lists, -1).tolist()
        return [tiles[:count] for tiles, count in zip(lists, call["counts_ptr"].tolist(), strict=True)]

    return run


# Query tiles x keys: one word and its edges, several words, a row longer than one chunk of words (32 x 32 tiles).
SHAPES = [(1, 1), (3, 200), (2, 31 * TILE), (2, 32 * TILE), (2, 32 * TILE + 1), (40, 40 * TILE), (36, 35 * TILE + 7),
          (2, 256 * TILE), (2, 257 * TILE), (1, 1100 * TILE - 5)]


@pytest.mark.parametrize("q_tiles, n_k", SHAPES)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_lists_are_the_visit_order(tile_lists, device, q_tiles, n_k, density):
    """Own tile first, ascending or descending by the row's own passes, the partial last tile last."""
    n_q = q_tiles * TILE - 1
    bits = [oracle.holes(1, 2, n_q, n_k, density, seed) for seed in range(2)]
    masks = [SkipMask.from_bool(b, n_q, n_k).to(device) for b in bits]
    masks[1].passes = [3]
    words = [m.words.clone() for m in masks]
    got = iter(tile_lists(masks, n_q, n_k, heads=2))
    for b, back in zip(bits, (False, True), strict=True):
        for head in range(2):
            for own in range(q_tiles):
                assert next(got) == oracle.order(b[0, head, own].tolist(), own, back, n_k)
    assert next(got, None) is None
    assert all(torch.equal(m.words, w) for m, w in zip(masks, words, strict=True)), "reading changes nothing"


@pytest.mark.parametrize("n_k", [5 * TILE, 300 * TILE + 1])
@pytest.mark.parametrize("must_keep", [None, MustKeep(keys=((130, 140), (400, 401)), queries=((300, 301),))])
def test_recording_leaves_the_must_keep_bits_only(tile_lists, device, n_k, must_keep):
    """The attention launch ORs its decisions into what is left; a tile that was inactive does not come back."""
    n_q = 3 * TILE
    bits = oracle.holes(1, 1, n_q, n_k, 0.5)
    mask = SkipMask.from_bool(bits, n_q, n_k).to(device)
    got = tile_lists([mask], n_q, n_k, recording=True, must_keep=must_keep)
    assert got == [oracle.order(bits[0, 0, own].tolist(), own, False, n_k) for own in range(3)]
    must = torch.zeros_like(bits) if must_keep is None else must_keep.tile_mask(n_q, n_k).expand_as(bits)
    assert torch.equal(mask.words.cpu(), pack_bits(bits & must))
