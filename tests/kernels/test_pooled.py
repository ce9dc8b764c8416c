"""Pooled keys and values: results and decisions against the oracle, and what must not change."""

import math

import kernel_oracle as oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liteattention.kernels import SkipMask, Workspace, lite_attention, tiles
from liteattention.kernels.pooled import pool_tiles

MARGIN = 5e-3
SHAPES = [(512, 512, 64, torch.float16), (300, 300, 128, torch.float16), (130, 700, 64, torch.float32),
          (640, 200, 96, torch.float32), (1, 1, 64, torch.float16), (384, 4500, 64, torch.float16)]


def smooth(n_q, n_k, d, dtype, seed=0, spread=0.4):
    """q, k, v of attention that is broad inside tiles and uneven between them; values go with keys, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, n, d, generator=generator) for n in (n_q, n_k, n_k))
    mixing = torch.randn(d, d, generator=generator) / d ** 0.5
    v = 0.5 * v + k @ mixing
    tile = torch.arange(n_k) // 128
    k = spread * k + 0.6 * torch.randn(2, 2, tiles(n_k), d, generator=generator)[:, :, tile]
    return [x.to(dtype) for x in (q, k, v + torch.randn(2, 2, tiles(n_k), d, generator=generator)[:, :, tile])]


def run(backend, device, inputs, start, threshold=-math.inf, criterion="max", **options):
    """(result, active bits after the call)."""
    place = device if backend == "triton" else "cpu"
    mask = SkipMask.from_bool(start, inputs[0].shape[2], inputs[1].shape[2]).to(place)
    out = lite_attention(*(x.to(place) for x in inputs), mask, threshold=threshold, criterion=criterion,
                         backend=backend, pool_skipped=True, **options)
    bits = mask.to_bool().cpu()
    return (tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()), bits


@pytest.mark.parametrize("n_q, n_k, d, dtype", SHAPES)
def test_results_are_those_of_the_oracle(backend, device, n_q, n_k, d, dtype):
    inputs = smooth(n_q, n_k, d, dtype)
    start = oracle.holes(2, 2, n_q, n_k, 0.5)
    start[0, 0, 0] = False  # a query tile that has pooled keys only
    expected = oracle.attention(*inputs, start, -math.inf, pool_skipped=True)
    (out, lse), _ = run(backend, device, inputs, start, record=False, return_lse=True)
    assert (out.double() - expected.out).abs().max() < (1e-2 if dtype == torch.float16 else 1e-4)
    assert (lse.double() - expected.lse).abs().max() < 5e-3
    if n_k > 512:
        plain = oracle.attention(*inputs, start, -math.inf)
        assert (plain.out - expected.out).abs().max() > 0.1, "the data needs pooling"


@pytest.mark.parametrize("n_q, n_k, d, dtype", SHAPES[:4])
@pytest.mark.parametrize("criterion, threshold", [("max", -3.0), ("mass", -4.0)])
def test_decisions_weigh_what_pooling_loses(backend, device, n_q, n_k, d, dtype, criterion, threshold):
    q, k, v = oracle.make(2, 2, n_q, n_k, d, torch.float32)
    strength = torch.zeros_like(k)
    strength[..., 0] = oracle.strengths(n_k)
    inputs = [x.to(dtype) for x in (q, 0.3 * (k - strength) + strength, v)]
    start = oracle.holes(2, 2, n_q, n_k, 0.8)
    expected = oracle.attention(*inputs, start, threshold, pool_skipped=True, mass=criterion == "mass")
    out, got = run(backend, device, inputs, start, threshold, criterion)
    clear = expected.margin > MARGIN
    assert torch.equal(got[clear], expected.keep[clear])
    assert (out.double() - expected.out).abs().max() < 1e-2
    plain = oracle.attention(*inputs, start, threshold, mass=criterion == "mass")
    if n_k > 500:
        assert expected.keep.sum() < plain.keep.sum(), "low variance raises thresholds"


def test_nothing_skipped_changes_no_bit(backend, device):
    for dtype in (torch.float16, torch.float32):
        inputs = smooth(300, 650, 64, dtype)
        place = device if backend == "triton" else "cpu"
        moved = [x.to(place) for x in inputs]
        full = SkipMask.full(2, 2, 300, 650, device=place)
        plain = lite_attention(*moved, full, backend=backend, record=False)
        assert torch.equal(lite_attention(*moved, full, backend=backend, record=False, pool_skipped=True), plain)
        assert torch.equal(lite_attention(*moved, backend=backend, pool_skipped=True), plain)


def test_it_is_nearer_to_dense_attention_than_leaving_out(backend, device):
    inputs = smooth(640, 640, 64, torch.float32)
    start = oracle.holes(2, 2, 640, 640, 0.4) | torch.eye(5, dtype=torch.bool)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs)
    out, _ = run(backend, device, inputs, start, record=False)
    place = device if backend == "triton" else "cpu"
    left_out = lite_attention(*(x.to(place) for x in inputs), SkipMask.from_bool(start, 640, 640).to(place),
                              record=False, backend=backend).cpu()
    assert (out - dense).norm() < 0.25 * (left_out - dense).norm()


def test_the_covariance_earns_its_place():
    """Values that go with keys: means alone miss it."""
    q, k, v = smooth(256, 640, 64, torch.float32)
    start = oracle.holes(2, 2, 256, 640, 0.4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out, _ = run("torch", "cpu", (q, k, v), start, record=False)
    independent = v[..., torch.randperm(640, generator=torch.Generator().manual_seed(5)), :]
    assert (out - dense).norm() < 0.1 * dense.norm()
    assert pool_tiles(k, v).shift.norm() > 2 * pool_tiles(k, independent).shift.norm()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(130, 900), seed=st.integers(0, 10**6), budget=st.sampled_from([0.3, 0.1, 0.02]),
       sharp=st.floats(0.1, 8), spread=st.floats(0.0, 2.0))
def test_no_row_loses_more_than_the_budget_over_what_pooling_loses(n, seed, budget, sharp, spread):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator) for _ in range(3))
    k = spread * k + sharp * torch.randn(tiles(n), 64, generator=generator).repeat_interleave(128, 0)[:n] / 4
    full = torch.ones(1, 1, tiles(n), tiles(n), dtype=torch.bool)
    _, kept = run("torch", "cpu", (q, k, v), full, math.log2(budget / tiles(n)), "mass")
    weights = torch.softmax(q.double() @ k.double().mT / 8, -1)
    lost = (weights * ~kept[:, :, torch.arange(n) // 128][..., torch.arange(n) // 128]).sum(-1)
    lost_share = (1 - torch.exp(-oracle.variance(q[0, 0].double() / 8, k[0, 0].double()))).clamp(1 / 64, 1)
    assert (lost * lost_share <= budget * (1 + 1e-3)).all()


@pytest.mark.parametrize("n, d", [(700, 64), (515, 128), (300, 96)])
def test_int8(device, n, d):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    inputs = smooth(n, n, d, torch.float16)
    inputs[1] += 3 * torch.randn(d, generator=torch.Generator().manual_seed(3)).half()  # a mean that INT8 takes off
    start = oracle.holes(2, 2, n, n, 0.5)
    expected = oracle.attention(*inputs, start, -math.inf, pool_skipped=True)
    out, _ = run("triton", device, inputs, start, record=False, precision="int8")
    assert (out.double() - expected.out).norm() < 0.02 * expected.out.norm()


@pytest.mark.parametrize("factor_k, factor_v", [(1, 3e4), (30, 1e-2), (1e-3, 1)])
def test_float16_holds_any_covariance(backend, device, factor_k, factor_v):
    q, k, v = smooth(256, 640, 64, torch.float32)
    inputs = [q.half() / factor_k, (k * factor_k).half(), (v / v.abs().max() * factor_v).half()]
    start = oracle.holes(2, 2, 256, 640, 0.5)
    expected = oracle.attention(*inputs, start, -math.inf, pool_skipped=True)
    out, _ = run(backend, device, inputs, start, record=False)
    assert (out.double() - expected.out).norm() < 0.01 * expected.out.norm()


def test_constant_keys_and_values(backend, device):
    """No variance at all: exact, and no division by zero."""
    q = smooth(256, 640, 64, torch.float16)[0]
    k, v = torch.ones(2, 2, 640, 64).half(), torch.full((2, 2, 640, 64), 0.5).half()
    start = oracle.holes(2, 2, 256, 640, 0.5)
    out, kept = run(backend, device, (q, k, v), start, -8.0, "mass")
    assert (out - 0.5).abs().max() < 1e-3
    assert not (kept & ~start).any()


def test_nan_in_a_skipped_tile_reaches_every_row_that_pools_it(backend, device):
    inputs = smooth(256, 512, 64, torch.float16)
    inputs[2][0, 0, 200, 5] = math.nan
    start = torch.ones(2, 2, 2, 4, dtype=torch.bool)
    start[:, :, 0, 1] = False
    out, _ = run(backend, device, inputs, start, record=False)
    assert out[0, 0, :128].isnan().any(1).all(), "as dense attention would have it"
    assert not out[0, 1].isnan().any() and not out[1].isnan().any()


def test_heads_and_rows_have_their_own(backend, device):
    """A batch of two with two masks equals each row alone."""
    inputs = smooth(300, 650, 64, torch.float32)
    start = oracle.holes(2, 2, 300, 650, 0.5)
    both, _ = run(backend, device, inputs, start, record=False)
    for row in range(2):
        alone, _ = run(backend, device, [x[row:row + 1] for x in inputs], start[row:row + 1], record=False)
        assert (alone - both[row:row + 1]).abs().max() < 1e-5


def test_layouts(backend, device):
    """Packed [B, N, H*D], and strides as a fused qkv projection leaves them."""
    q, k, v = (x[:, :, :512] for x in smooth(512, 512, 64, torch.float16))
    start = oracle.holes(2, 2, 512, 512, 0.5)
    expected, _ = run(backend, device, (q, k, v), start, record=False)
    fused = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    got, _ = run(backend, device, [x.transpose(1, 2) for x in fused.unbind(2)], start, record=False)
    assert torch.equal(got, expected)
    place = device if backend == "triton" else "cpu"
    packed = lite_attention(*(x.transpose(1, 2).flatten(2).to(place) for x in (q, k, v)),
                            SkipMask.from_bool(start, 512, 512).to(place), record=False, heads=2, pool_skipped=True,
                            backend=backend)
    assert torch.equal(packed.cpu().unflatten(-1, (2, 64)).transpose(1, 2), expected)


def test_backends_agree(device):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    inputs = smooth(515, 1100, 128, torch.float32)
    start = oracle.holes(2, 2, 515, 1100, 0.6)
    a, kept_a = run("torch", "cpu", inputs, start, -5.0, "mass")
    b, kept_b = run("triton", device, inputs, start, -5.0, "mass")
    assert (a - b).abs().max() < 2e-4 and (kept_a != kept_b).float().mean() < 0.02 and kept_a.sum() < start.sum()


def test_steady_calls_keep_their_scratch(device):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    inputs = [x.to(device) for x in smooth(300, 650, 64, torch.float16)]
    mask, workspace = SkipMask.full(2, 2, 300, 650, device=device), Workspace()
    sizes = []
    for _ in range(3):
        lite_attention(*inputs, mask, threshold=-4.0, criterion="mass", pool_skipped=True, backend="triton",
                       workspace=workspace)
        sizes.append(workspace.nbytes)
    assert sizes[1] == sizes[2]
