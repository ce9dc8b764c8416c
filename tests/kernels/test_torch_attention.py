"""The torch backend as it computes on an accelerator without Triton, driven here on the CPU."""

import math

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, lite_attention
from liteattention.kernels import torch_attention as module

F32 = torch.float32


@pytest.fixture(params=[64 * 2**20, 5 * 128 * 128], ids=["one group", "small groups"])
def budget(grouped, request):
    """Elements of one score matrix; the small one holds a handful of tiles."""
    grouped.setattr(module, "_SCORE_BUDGET", request.param)


@pytest.mark.parametrize("n_q, n_k", [(640, 640), (700, 700), (100, 900), (900, 100), (1, 1)])
def test_groups_give_the_result_and_the_masks(budget, n_q, n_k):
    """Two batch rows of different direction, holes, and query tiles with nothing left to compute."""
    start = oracle.holes(2, 2, n_q, n_k, 0.6)
    start[0, 0, -1] = False
    mask = SkipMask.from_bool(start, n_q, n_k)
    mask.passes = [0, 1]
    must = MustKeep(keys=((0, 1),))
    inputs = oracle.make(2, 2, n_q, n_k, 64, F32)
    expected = oracle.attention(*inputs, start, -4.0, [False, True], must=must.tile_mask(n_q, n_k))
    computed = torch.zeros(1, dtype=torch.int64)
    out, lse = lite_attention(*inputs, mask, threshold=-4.0, must_keep=must, backend="torch", return_lse=True,
                              computed=computed)
    assert (out - expected.out).abs().max() < 3e-5
    assert torch.allclose(lse.double(), expected.lse, atol=2e-5)
    clear = expected.margin > 2e-3
    assert torch.equal(mask.to_bool()[clear], expected.keep[clear])
    assert computed.item() == start.sum() and mask.passes == [1, 2]
    if min(n_q, n_k) > 500:
        assert mask.to_bool().sum() < start.sum(), "data that drops nothing proves nothing"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_padding_with_a_tile_of_nan_reaches_nobody(grouped, where, value):
    """Shorter lists are padded with key tile 0; what is not finite there stays with those who compute it."""
    start = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    start[0, 0, 1:, 0] = False
    start[0, 0, 2, 1] = False
    inputs = oracle.make(1, 1, 512, 512, 64, F32)
    dict(zip("qkv", inputs, strict=True))[where][0, 0, 5, 3] = value
    mask = SkipMask.from_bool(start, 512, 512)
    expected = oracle.attention(*inputs, start, -4.0)
    out = lite_attention(*inputs, mask, threshold=-4.0, backend="torch")
    assert expected.out[0, 0, 128:].isfinite().all() and not expected.out[0, 0, :128].isfinite().all()
    assert torch.equal(out.isnan(), expected.out.isnan()) and torch.equal(out.isinf(), expected.out.isinf())
    assert torch.equal(mask.to_bool(), expected.keep)


def test_groups_hold_tiles_of_one_kind_within_the_budget(grouped):
    """Alike in query rows, tail and emptiness; at most the budget's scores at once."""
    start = oracle.holes(2, 3, 700, 700, 0.5)
    start[1, 2, 3] = False
    lists = [module._TileList(b, h, qt, *module._split_tail(start[b, h, qt].numpy(), True), False)
             for b in range(2) for h in range(3) for qt in range(6)]
    grouped.setattr(module, "_SCORE_BUDGET", 12 * 128 * 128)
    groups = module._groups(lists, 700, None)
    assert sorted(id(x) for group in groups for x in group) == sorted(map(id, lists)), "each exactly once"
    assert max(map(len, groups)) > 1
    for group in groups:
        assert len({(x.qt == 5, x.empty, x.tail) for x in group}) == 1
        assert len(group) == 1 or len(group) * (max(x.body.size for x in group) + 1) <= 12
