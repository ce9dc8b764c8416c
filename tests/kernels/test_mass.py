"""The mass criterion: decisions against the oracle, and the bound that it promises."""

import math

import kernel_oracle as oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liteattention.kernels import SkipMask, Workspace, lite_attention, tiles

MARGIN = 2e-3


def recorded(backend, device, inputs, start, threshold, backwards=False, **options):
    """Active bits after one recording pass, and the result."""
    place = device if backend == "triton" else "cpu"
    mask = SkipMask.from_bool(start, inputs[0].shape[2], inputs[1].shape[2]).to(place)
    mask.passes = [int(backwards)] * mask.batch
    out = lite_attention(*(x.to(place) for x in inputs), mask, threshold=threshold, criterion="mass", backend=backend,
                         **options)
    return mask.to_bool().cpu(), out


@pytest.mark.parametrize("n_q, n_k, d, dtype", [(512, 512, 64, torch.float16), (300, 300, 128, torch.float16),
                                               (130, 700, 64, torch.float32), (640, 200, 96, torch.float32),
                                               (1, 1, 64, torch.float16)])
@pytest.mark.parametrize("backwards", [False, True])
def test_decisions_are_those_of_the_oracle(backend, device, n_q, n_k, d, dtype, backwards):
    inputs = oracle.make(2, 1, n_q, n_k, d, dtype)
    start = oracle.holes(2, 1, n_q, n_k, 0.8)
    expected = oracle.attention(*inputs, start, -4.0, backwards, mass=True)
    got, out = recorded(backend, device, inputs, start, -4.0, backwards)
    clear = expected.margin > MARGIN
    assert torch.equal(got[clear], expected.keep[clear])
    assert (out.double().cpu() - expected.out).abs().max() < 5e-3, "the call itself computes every active tile"
    if min(n_q, n_k) > 256:
        assert expected.keep.sum() < start.sum()


@pytest.mark.parametrize("block_n, in_registers", [(128, False), (64, True), (32, False), (16, True)])
def test_the_compute_tile_does_not_change_a_decision(device, block_n, in_registers):
    """The sum over the parts of a mask tile decides, not a part: 300 keys leave a last tile of one part and a bit."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    from liteattention.kernels.launch_table import LaunchConfig
    from liteattention.kernels.triton_launch import triton_attention

    inputs = [x.to(device) for x in oracle.make(1, 2, 300, 610, 64, torch.float16)]
    start = oracle.holes(1, 2, 300, 610, 0.8)
    expected = oracle.attention(*(x.cpu() for x in inputs), start, -6.0, mass=True)
    mask = SkipMask.from_bool(start, 300, 610).to(device)
    triton_attention(*inputs, torch.empty_like(inputs[0]), None, [(mask, 0)], [False], -6.0, True, None, 0.125,
                     Workspace(), None, mass=True,
                     config=LaunchConfig(BLOCK_N=block_n, record_in_registers=in_registers))
    clear = expected.margin > MARGIN
    assert torch.equal(mask.to_bool().cpu()[clear], expected.keep[clear]) and expected.keep.sum() < start.sum()


def lost_mass(inputs, kept, before):
    """Largest share of a row's softmax (over the tiles of `before`) that lies in tiles not in `kept`."""
    q, k = (x.double() for x in inputs[:2])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    rows, columns = torch.arange(q.shape[2]) // 128, torch.arange(k.shape[2]) // 128
    seen = before[:, :, rows][..., columns]
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num()
    return (weights * ~kept[:, :, rows][..., columns]).sum(-1).max().item()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(130, 900), seed=st.integers(0, 10**6), budget=st.sampled_from([0.3, 0.1, 0.02, 1e-3]),
       sharp=st.floats(0.1, 12), backwards=st.booleans())
def test_no_row_loses_more_than_the_budget(n, seed, budget, sharp, backwards):
    """eps = budget / key tiles: whatever the scores and the order, at recording time."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator) for _ in range(3))
    # Some tiles are strong, some weak, some rows look elsewhere than others.
    k = k * sharp ** torch.rand(tiles(n), generator=generator).repeat_interleave(128)[:n, None]
    k = k + sharp * torch.randn(tiles(n), 64, generator=generator).repeat_interleave(128, 0)[:n] / 4
    full = torch.ones(1, 1, tiles(n), tiles(n), dtype=torch.bool)
    kept, _ = recorded("torch", "cpu", (q, k, v), full, math.log2(budget / tiles(n)), backwards)
    assert lost_mass((q, k), kept, full) <= budget * (1 + 1e-4)


def test_the_bound_is_not_met_by_dropping_nothing(backend, device):
    inputs = oracle.make(1, 2, 640, 640, 64, torch.float16)
    full = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    kept, _ = recorded(backend, device, inputs, full, math.log2(0.1 / 5))
    assert kept.sum() < full.sum() and 0 < lost_mass(inputs, kept, full) <= 0.1


def test_int8_is_more_careful_by_its_guard(device):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    inputs = oracle.make(1, 2, 640, 640, 128, torch.float16)
    full = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    exact, _ = recorded("triton", device, inputs, full, -4.0)
    int8, _ = recorded("triton", device, inputs, full, -4.0, precision="int8")
    assert not (exact & ~int8).any() and int8.sum() < full.sum()


def test_rows_without_a_finite_score_keep(backend, device):
    inputs = list(oracle.make(1, 1, 384, 384, 64, torch.float16))
    inputs[0][0, 0, 5, 3] = math.nan
    full = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    kept, _ = recorded(backend, device, inputs, full, -1.0)
    assert kept[0, 0, 0].all() and not kept[0, 0, 1:].all()


def test_an_unknown_criterion_is_named():
    x = torch.zeros(1, 1, 8, 64)
    with pytest.raises(ValueError, match="criterion is 'sum'; allowed: max, mass"):
        lite_attention(x, x, x, criterion="sum")
