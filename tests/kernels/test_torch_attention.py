"""The torch backend: groups of query tiles, threads, with and without TorchScript, weights that underflow."""

import math

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention, torch_attention
from liteattention.kernels.torch_tiles import attend_part, scripted

F32 = torch.float32


@pytest.fixture
def threads():
    """Sets the number of torch threads of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def call(n_q, n_k, *, criterion="max", pool_skipped=False, dtype=F32):
    """(out, lse, words) of two batch rows of different direction, with holes, a tile to keep, and a query tile without
    tiles."""
    start = oracle.holes(2, 2, n_q, n_k, 0.6)
    start[0, 0, -1] = False
    mask = SkipMask.from_bool(start, n_q, n_k)
    mask.passes = [0, 1]
    inputs = oracle.make(2, 2, n_q, n_k, 64, dtype)
    out, lse = lite_attention(*inputs, mask, threshold=-4.0, must_keep=MustKeep(keys=((0, 1),)), backend="torch",
                              return_lse=True, criterion=criterion, pool_skipped=pool_skipped)
    return out, lse, mask.words


@pytest.mark.parametrize("criterion", ["max", "mass"])
@pytest.mark.parametrize("n_q, n_k", [(640, 640), (700, 700), (100, 900), (900, 100), (1, 1), (2500, 1300)])
def test_results_and_masks_are_those_of_the_oracle(n_q, n_k, criterion):
    """Float32: every decision that is not closer to the threshold than rounding."""
    start = oracle.holes(2, 2, n_q, n_k, 0.6)
    start[0, 0, -1] = False
    mask = SkipMask.from_bool(start, n_q, n_k)
    mask.passes = [0, 1]
    must = MustKeep(keys=((0, 1),))
    inputs = oracle.make(2, 2, n_q, n_k, 64, F32)
    expected = oracle.attention(*inputs, start, -4.0, [False, True], must=must.tile_mask(n_q, n_k),
                                mass=criterion == "mass")
    computed = torch.zeros(1, dtype=torch.int64)
    out, lse = lite_attention(*inputs, mask, threshold=-4.0, must_keep=must, backend="torch", return_lse=True,
                              computed=computed, criterion=criterion)
    assert (out - expected.out).abs().max() < 3e-5
    assert torch.allclose(lse.double(), expected.lse, atol=2e-5)
    clear = expected.margin > 1e-5
    assert clear.float().mean() > 0.99 and torch.equal(mask.to_bool()[clear], expected.keep[clear])
    assert computed.item() == start.sum() and mask.passes == [1, 2]
    if min(n_q, n_k) > 500:
        assert mask.to_bool().sum() < start.sum(), "data that drops nothing proves nothing"


@pytest.mark.parametrize("n_q, n_k", [(1600, 1600), (700, 1300), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"criterion": "mass"}, {"pool_skipped": True}, {"dtype": torch.bfloat16}],
                         ids=str)
def test_every_number_of_threads_and_every_grouping_gives_the_same_bits(threads, monkeypatch, n_q, n_k, options):
    runs = []
    for number, group in ((1, 4), (2, 4), (2, 1), (3, 2), (5, 4), (2, 4)):
        threads(number)
        monkeypatch.setattr(torch_attention, "_GROUP", group)
        runs.append(call(n_q, n_k, **options))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("options", [{}, {"criterion": "mass"}, {"pool_skipped": True}, {"dtype": torch.float16}],
                         ids=str)
def test_without_torchscript_the_bits_are_the_same(monkeypatch, options):
    assert scripted("cpu") is not attend_part, "TorchScript compiles the functions"
    with_it = call(700, 700, **options)
    monkeypatch.setattr(torch_attention, "scripted", lambda device_type: attend_part)
    assert all(torch.equal(a, b) for a, b in zip(call(700, 700, **options), with_it, strict=True))


def test_torchscript_that_fails_does_without(monkeypatch):
    def broken(function):
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.jit, "script", broken)
    scripted.cache_clear()
    try:
        assert scripted("cpu") is attend_part
    finally:
        scripted.cache_clear()
    assert scripted("cuda") is attend_part, "errors of a GPU keep their type"


@pytest.mark.parametrize("n", [640, 700])
@pytest.mark.parametrize("layout", ["strided", "contiguous", "fused"])
def test_layouts_give_the_same_bits_whoever_used_the_workspace_before(layout, n):
    """Only contiguous float32 of whole tiles is used as it is; what an earlier call left behind shows nowhere."""
    workspace = Workspace()
    dirty = torch.full((1, 2, 700, 64), math.nan).transpose(1, 2).contiguous().transpose(1, 2)
    lite_attention(dirty, dirty, dirty, backend="torch", workspace=workspace)
    results = []
    for shared, which in ((None, "contiguous"), (workspace, layout)):
        mask = SkipMask.from_bool(oracle.holes(1, 2, n, n, 0.6), n, n)
        inputs = oracle.make(1, 2, n, n, 64, F32, which)
        out = lite_attention(*inputs, mask, threshold=-4.0, backend="torch", workspace=shared, pool_skipped=True)
        results.append((out, mask.words))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][0].isfinite().all()


@pytest.mark.parametrize("depth", [70.0, 95.0, 110.0, 1000.0])
@pytest.mark.parametrize("criterion", ["max", "mass"])
def test_weights_that_underflow_count_for_nothing(depth, criterion):
    """Scores far below the maximum: weights of 1e-31 to exactly 0 in float64, denormal or 0 in float32."""
    q, k, v = oracle.make(1, 1, 384, 1500, 64, F32)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, 256:1100, 0] = -depth
    mask = SkipMask.full(1, 1, 384, 1500)
    expected = oracle.attention(q, k, v, mask.to_bool(), -20.0, mass=criterion == "mass")
    out, lse = lite_attention(q, k, v, mask, threshold=-20.0, criterion=criterion, backend="torch", return_lse=True)
    assert (out - expected.out).abs().max() < 3e-5 and torch.allclose(lse.double(), expected.lse, atol=2e-5)
    assert torch.equal(mask.to_bool(), expected.keep) and not expected.keep[0, 0, 0, 3:8].any()


@pytest.mark.parametrize("criterion", ["max", "mass"])
def test_a_row_of_nothing_but_minus_infinity(criterion):
    """NaN as in dense attention and not 0 as without tiles; other rows do not notice."""
    q, k, v = oracle.make(1, 1, 256, 300, 64, F32)
    q[0, 0, 5, 0], k[..., 0] = -math.inf, k[..., 0].abs() + 1
    start = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    start[0, 0, 1] = False
    mask = SkipMask.from_bool(start, 256, 300)
    out, lse = lite_attention(q, k, v, mask, threshold=-1.0, criterion=criterion, backend="torch", return_lse=True)
    assert out[0, 0, 5].isnan().all() and lse[0, 0, 5] == -math.inf and mask.to_bool()[0, 0, 0].all()
    assert out[0, 0, :5].isfinite().all() and lse[0, 0, :5].isfinite().all()
    assert (out[0, 0, 128:] == 0).all() and (lse[0, 0, 128:] == -math.inf).all()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_result_belongs_to_the_callers_mode(threads, mode):
    threads(2)
    inputs = oracle.make(1, 1, 300, 300, 64, F32)
    if mode is not torch.enable_grad:
        inputs[0].requires_grad_()
    mask = SkipMask.full(1, 1, 300)
    with mode():
        out = lite_attention(*inputs, mask, threshold=-4.0, backend="torch", pool_skipped=True)
        assert out.is_inference() == torch.is_inference_mode_enabled() and not out.requires_grad
        out.mul_(2)  # as a caller may
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not mask.words.is_inference()


def test_autocast_of_the_caller_changes_nothing(threads):
    for number in (1, 2):
        threads(number)
        plain = call(300, 300)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = call(300, 300)
        assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


def test_a_row_that_meets_nothing_but_minus_infinity_at_first_keeps_those_tiles():
    """By the mass test, with so high a threshold that an equal share of three tiles would not do."""
    q, k, v = oracle.make(1, 1, 128, 640, 64, F32)
    q[..., 0], k[..., 0] = 1, 0.0
    k[:, :, :384, 0] = -math.inf
    mask = SkipMask.full(1, 1, 128, 640)
    expected = oracle.attention(q, k, v, mask.to_bool(), -1.0, mass=True)
    lite_attention(q, k, v, mask, threshold=-1.0, criterion="mass", backend="torch")
    assert torch.equal(mask.to_bool(), expected.keep) and expected.keep[0, 0, 0, :3].all()
