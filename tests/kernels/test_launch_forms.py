"""What a launch may differ in without a difference in its results: order of programs, descriptors, torch.compile."""

import dataclasses
import math
import threading

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention

pytest.importorskip("triton", reason="Triton is not installed on this system")
SHAPES = [(512, 512), (300, 300), (100, 700), (640, 200), (1, 1), (129, 128), (385, 385)]


def launch(inputs, mask, device, threshold=-4.0, workspace=None, **options):
    from liteattention.kernels.triton_launch import triton_attention

    inputs = [x.to(device) for x in inputs]
    out = torch.empty_like(inputs[0])
    triton_attention(*inputs, out, None, [(mask, e) for e in range(mask.batch)], [False] * mask.batch, threshold, True,
                     None, inputs[0].shape[-1] ** -0.5, workspace or Workspace(), None, **options)
    return out


def default(device, **changes):
    from liteattention.kernels.launch_table import architecture, launch_config

    config = launch_config(architecture(torch.device(device)), 64, torch.float16)
    return dataclasses.replace(config, **changes)


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
    monkeypatch.setattr(triton_launch, "TensorDescriptor", lambda *args: made.append(args))
    odd = torch.randn(1, 300, 2 * 64 + 4, generator=torch.Generator().manual_seed(0)).half()
    full = SkipMask.full(1, 2, 300, device=device)
    for x in (odd[..., 4:].unflatten(-1, (2, 64)).transpose(1, 2),             # rows of 132 elements: 264 bytes
              torch.randn(1, 300, 2 * 64 + 8).half()[..., 4:-4].unflatten(-1, (2, 64)).transpose(1, 2),  # 8-byte start
              torch.randn(1, 1, 300, 64).half().expand(1, 2, 300, 64)):
        out = launch((x, x, x), full.clone(), device, config=default(device, tma=True))
        exact = torch.nn.functional.scaled_dot_product_attention(*[x.double()] * 3)
        assert (out.double().cpu() - exact).abs().max() < 5e-3
    assert not made
    launch(oracle.make(1, 2, 300, 300, 96, torch.float16), full, device, config=default(device, tma=True))
    assert not made, "head_dim 96 is not one block wide"


@pytest.mark.parametrize("n_q, n_k", [(512, 512), (1300, 700)])
def test_the_order_of_programs_changes_nothing(device, monkeypatch, n_q, n_k):
    """Costly lists first or not: same bits, same masks; and a shared workspace stays right from call to call."""
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


class Attention:
    """In place of the last launch: keeps what it is given."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda **arguments: self.seen.append({**arguments, "programs": grid[0]})


@pytest.mark.parametrize("n_q, n_k, density", [(1300, 2560, 0.5), (700, 5000, 0.2), (600, 600, 1.0)])
@pytest.mark.parametrize("ordered", [True, False])
def test_every_list_has_one_program_whatever_was_launched_before(device, monkeypatch, n_q, n_k, density, ordered):
    """The longest lists first in short calls. Nothing of an earlier call has a say: each order is made anew, so a call
    that is repeated, captured, left unfinished or made by another thread cannot leave a list out."""
    from liteattention.kernels import triton_launch

    attention = Attention()
    monkeypatch.setattr(triton_launch, "attention_kernel", attention)
    if not ordered:
        monkeypatch.setattr(triton_launch, "COST_ORDER_MAX_TOKENS", 0)
    workspace = Workspace()
    x, y = torch.zeros(1, 2, n_q, 64, dtype=torch.float16), torch.zeros(1, 2, n_k, 64, dtype=torch.float16)
    for seed in (0, 0, 1):
        mask = SkipMask.from_bool(oracle.holes(1, 2, n_q, n_k, density, seed), n_q, n_k).to(device)
        launch((x, y, y), mask, device, workspace=workspace)
    for call in attention.seen:
        order, counts = call["order_ptr"].tolist(), call["counts_ptr"].tolist()
        assert sorted(order) == list(range(call["programs"])) and len(counts) == call["programs"]
    lengths = [counts[i] for i in order]
    assert lengths == sorted(lengths, reverse=True) if ordered else order == sorted(order)


def test_two_threads_on_one_workspace_lose_nothing(device):
    """Their launches in turns (one at a time, as streams of a device keep them): every row of both is computed."""
    inputs = oracle.make(1, 2, 640, 640, 64, torch.float16)
    alone = SkipMask.full(1, 2, 640, device=device)
    expected = launch(inputs, alone, device)
    shared, lock, found = Workspace(), threading.Lock(), []

    def work():
        for _ in range(2):
            mask = SkipMask.full(1, 2, 640, device=device)
            with lock:
                out = launch(inputs, mask, device, workspace=shared)
            found.append((out, mask.words))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(out, expected) and torch.equal(words, alone.words) for out, words in found)


@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize("criterion", ["max", "mass"])
@pytest.mark.parametrize("threshold", [-4.0, -math.inf])
@pytest.mark.parametrize("pool_skipped", [False, True])
def test_a_call_that_does_not_record_changes_no_bit_of_its_mask(device, monkeypatch, in_registers, criterion, threshold,
                                                               pool_skipped):
    """It runs the recording kernel, which can only set bits that are set: also for NaN and Inf, under must-keep ranges,
    and where not a single tile is active."""
    from liteattention.kernels import triton_launch

    config = default(device, record_in_registers=in_registers)
    monkeypatch.setattr(triton_launch, "launch_config", lambda *kind: config)
    inputs = list(oracle.make(2, 2, 400, 700, 64, torch.float16))
    inputs[0][0, 0, 5, 3], inputs[1][0, 1, 300, 0], inputs[1][1, 0, 690, 2] = math.nan, math.inf, -math.inf
    start = oracle.holes(2, 2, 400, 700, 0.5)
    start[1, 1, 2] = False
    mask = SkipMask.from_bool(start, 400, 700).to(device)
    words = mask.words.clone()
    for passes in (0, 1):
        mask.passes = [passes] * 2
        lite_attention(*(x.to(device) for x in inputs), mask, threshold=threshold, criterion=criterion, record=False,
                       must_keep=MustKeep(keys=((0, 200),), queries=((0, 1),)), pool_skipped=pool_skipped,
                       backend="triton")
        assert torch.equal(mask.words, words) and mask.passes == [passes] * 2


def test_a_call_that_does_not_record_gives_the_result_of_one_that_does(backend, place):
    inputs = [x.to(place) for x in oracle.make(1, 2, 400, 400, 64, torch.float16)]
    start = SkipMask.from_bool(oracle.holes(1, 2, 400, 400, 0.7), 400, 400).to(place)
    outs = [lite_attention(*inputs, start.clone(), threshold=-4.0, record=record, backend=backend)
            for record in (True, False)]
    assert torch.equal(*outs)


def test_the_bare_function_can_stand_in_a_compiled_one(backend, place):
    """torch.compile leaves it alone: same result, and a mask that was recorded."""
    inputs = [x.to(place) for x in oracle.make(1, 2, 400, 400, 64, torch.float16)]
    masks = [SkipMask.full(1, 2, 400, device=place) for _ in range(2)]

    def block(q, k, v, mask):
        return lite_attention(q * 1, k, v, mask, threshold=-4.0, backend=backend) + 1

    compiled = torch.compile(block, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(*inputs, masks[0]), block(*inputs, masks[1]))
    assert torch.equal(masks[0].words, masks[1].words) and masks[0].passes == [2] and masks[0].density() < 1
