"""Forms of one kernel that must not differ in their results: dense loop, launch order, descriptors, early skipping."""

import dataclasses

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention

pytest.importorskip("triton", reason="Triton is not installed on this system")
SHAPES = [(512, 512), (300, 300), (100, 700), (640, 200), (1, 1), (129, 128), (385, 385)]


def launch(inputs, mask, device, threshold=-4.0, workspace=None, must_keep=None, backwards=False, **options):
    from liteattention.kernels.triton_launch import triton_attention

    inputs = [x.to(device) for x in inputs]
    out = torch.empty_like(inputs[0])
    rows = None if mask is None else [(mask, r) for r in range(mask.batch)]
    triton_attention(*inputs, out, None, rows, None if mask is None else [backwards] * mask.batch, threshold,
                     mask is not None, must_keep, inputs[0].shape[-1] ** -0.5, workspace or Workspace(), None,
                     **options)
    return out


def default(device, **changes):
    from liteattention.kernels.launch_table import CallKind, architecture, launch_config

    config = launch_config(CallKind(architecture(torch.device(device)), 64, torch.float16, True))
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("n_q, n_k", SHAPES)
@pytest.mark.parametrize("block_n", [64, 128])
def test_the_dense_loop_is_a_full_list_bit_for_bit(device, n_q, n_k, block_n):
    inputs = oracle.make(1, 2, n_q, n_k, 64, torch.float16)
    config = default(device, BLOCK_N=block_n)
    dense = launch(inputs, None, device, config=config)
    listed = launch(inputs, SkipMask.full(1, 2, n_q, n_k, device=device), device, -1e30, config=config)
    assert torch.equal(dense, listed)


@pytest.mark.parametrize("n_q, n_k", SHAPES)
def test_descriptors_load_what_pointers_load(device, n_q, n_k):
    inputs = oracle.make(2, 2, n_q, n_k, 64, torch.float16)
    start = SkipMask.from_bool(oracle.holes(2, 2, n_q, n_k, 0.8), n_q, n_k).to(device)
    masks = [start.clone(), start.clone()]
    a, b = (launch(inputs, mask, device, config=default(device, tma=tma)) for mask, tma in zip(masks, (False, True),
                                                                                             strict=True))
    assert torch.equal(a, b) and torch.equal(masks[0].words, masks[1].words)


def test_what_descriptors_cannot_take_is_loaded_by_pointers(device, monkeypatch):
    """Unaligned addresses and strides, broadcast heads: same results, no descriptor made."""
    from liteattention.kernels import triton_launch

    made = []
    monkeypatch.setattr(triton_launch, "_descriptor", lambda *args: made.append(args))
    odd = torch.randn(1, 300, 2 * 64 + 4, generator=torch.Generator().manual_seed(0)).half()
    for x in (odd[..., 4:].unflatten(-1, (2, 64)).transpose(1, 2),             # rows of 132 elements: 264 bytes
              torch.randn(1, 300, 2 * 64 + 8).half()[..., 4:-4].unflatten(-1, (2, 64)).transpose(1, 2),  # 8-byte start
              torch.randn(1, 1, 300, 64).half().expand(1, 2, 300, 64)):
        out = launch((x, x, x), None, device, config=default(device, tma=True))
        exact = torch.nn.functional.scaled_dot_product_attention(*[x.double()] * 3)
        assert (out.double().cpu() - exact).abs().max() < 5e-3
    assert not made
    launch(oracle.make(1, 2, 300, 300, 96, torch.float16), None, device, config=default(device, tma=True))
    assert not made, "head_dim 96 is not one block wide"


@pytest.mark.parametrize("n_q, n_k", [(512, 512), (1300, 700)])
def test_the_order_of_rows_changes_nothing(device, monkeypatch, n_q, n_k):
    """Costly rows first or not: same bits, same masks; and a shared workspace stays right from call to call."""
    from liteattention.kernels import triton_launch

    shared = Workspace()
    results = {}
    for limit in (10**9, 0):
        monkeypatch.setattr(triton_launch, "COST_ORDER_MAX_TOKENS", limit)
        outs = []
        for call, heads in enumerate((2, 1, 3, 2)):
            mask = SkipMask.from_bool(oracle.holes(1, heads, n_q, n_k, 0.25 * (call + 1), call), n_q, n_k).to(device)
            inputs = oracle.make(1, heads, n_q, n_k, 64, torch.float16, seed=call)
            outs += [launch(inputs, mask, device, workspace=shared), mask.words]
        results[limit] = outs
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))


@pytest.mark.parametrize("n_q, n_k, density", [(1300, 2560, 0.5), (700, 5000, 0.2), (600, 600, 1.0)])
def test_rows_start_by_cost_each_once(device, monkeypatch, n_q, n_k, density):
    from liteattention.kernels import triton_launch

    seen = []
    classes = triton_launch.COST_CLASSES

    class Attention:
        __name__ = "attention_kernel"

        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(args)

    monkeypatch.setattr(triton_launch, "attention_kernel", Attention())
    workspace = Workspace()
    for seed in range(3):
        mask = SkipMask.from_bool(oracle.holes(1, 2, n_q, n_k, density, seed), n_q, n_k).to(device)
        x = torch.zeros(1, 2, n_q, 64, dtype=torch.float16)
        y = torch.zeros(1, 2, n_k, 64, dtype=torch.float16)
        launch((x, y, y), mask, device, workspace=workspace)
        n_rows = 2 * -(-n_q // 128)
        counts, order, turn = seen[-1][10][:n_rows].tolist(), seen[-1][11].tolist(), seed % 2
        sizes = order[turn * classes:(turn + 1) * classes]
        rows = [order[2 * classes + c * n_rows + i] for c, size in enumerate(sizes) for i in range(size)]
        assert sorted(rows) == list(range(n_rows))
        k_tiles = -(-n_k // 128)
        ranks = [min(counts[r] * classes // k_tiles, classes - 1) for r in rows]
        assert ranks == sorted(ranks, reverse=True)
        assert order[(1 - turn) * classes:(2 - turn) * classes] == [0] * classes, "ready for the next call"


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("n_q, n_k", [(512, 512), (300, 900)])
def test_skipping_at_once_decides_alike_and_leaves_out_what_it_dropped(device, n_q, n_k, int8):
    inputs = oracle.make(1, 2, n_q, n_k, 64, torch.float16)
    masks = [SkipMask.full(1, 2, n_q, n_k, device=device) for _ in range(2)]
    config = default(device, branch=True, BLOCK_N=128)
    late, early = (launch(inputs, mask, device, skip_now=now, int8=int8, config=config)
                   for mask, now in zip(masks, (False, True), strict=True))
    assert torch.equal(masks[0].words, masks[1].words)
    kept = masks[0].to_bool().cpu()
    assert 0 < kept.sum() < kept.numel()
    assert not torch.equal(late, early)
    if not int8:
        exact = oracle.attention(*inputs, kept, -1e30).out
        assert (early.double().cpu() - exact).abs().max() < 5e-3, "the result is that over the tiles that stay"


def test_skipping_at_once_gives_way_to_must_keep(device):
    inputs = oracle.make(1, 1, 512, 512, 64, torch.float16)
    must_keep, config = MustKeep(keys=((300, 301),)), default(device, branch=True)
    outs = [launch(inputs, SkipMask.full(1, 1, 512, device=device), device, skip_now=now, must_keep=must_keep,
                   config=config) for now in (False, True)]
    assert torch.equal(*outs)


def test_skipping_at_once_is_asked_for(device):
    """`lite_attention` computes what it drops unless told otherwise."""
    inputs = [x.to(device) for x in oracle.make(1, 1, 512, 512, 64, torch.float16)]
    outs = [lite_attention(*inputs, SkipMask.full(1, 1, 512, device=device), threshold=-4.0, backend="triton",
                           skip_now=now) for now in (False, True)]
    assert torch.equal(outs[0], launch(inputs, SkipMask.full(1, 1, 512, device=device), device))
    assert not torch.equal(*outs)
