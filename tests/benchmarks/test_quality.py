"""The quality lab: its figures, and its simulation against a plain loop and against the pack's own kernels."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.quality_methods import Method, Setting, cube_order, measure, simulate
from support.quality_metrics import interpolate, quantile, ssim
from support.quality_report import frontier, points, psnr_at, verdict
from support.quality_runs import CASES, trace
from support.sol import BLOCK, sol_attention, sol_routes

from liteattention.benchmarks.demo_pipeline.clips import psnr
from liteattention.kernels import SkipMask, lite_attention
from liteattention.kernels.pooled import LOST_MIN, pool_tiles

DENSE = torch.nn.functional.scaled_dot_product_attention


def inputs(seqlen=300, heads=2, batch=1, head_dim=64, seed=0, scale=2.0, alike=16):
    """q, k, v [B, H, N, D] float32 in which `alike` neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(batch, heads, -(-seqlen // alike), head_dim, generator=generator).repeat_interleave(alike, 2)
    return [scale * drift[:, :, :seqlen] + torch.randn(batch, heads, seqlen, head_dim, generator=generator)
            for _ in range(3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(q, k) [2, H, N, D] of each layer of the demo model in the second of three steps."""
    path = tmp_path_factory.mktemp("trace") / "trained.safetensors"
    trace(CASES[1], 3, "cpu", [0, 1, 2, 3, 4], [1], path)
    found = load_file(path)
    return [(found[f"step1.layer{layer}.q"], found[f"step1.layer{layer}.k"]) for layer in range(5)]


def test_psnr_and_ssim_of_known_pictures():
    a = torch.full((2, 16, 20, 3), 0.4)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert ssim(a, a) == pytest.approx(1.0)
    # Constant pictures: only the luminance term is left.
    assert ssim(a, a + 0.1) == pytest.approx((2 * 0.4 * 0.5 + 1e-4) / (0.16 + 0.25 + 1e-4), abs=1e-6)
    noise = torch.rand(1, 16, 20, 3, generator=torch.Generator().manual_seed(0))
    assert ssim(noise, 1 - noise) < -0.8 and ssim(noise, noise.flip(1)) < 0.3


def test_ssim_of_one_window_by_hand():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(1, 11, 11, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    line = [math.exp(-(i - 5) ** 2 / (2 * 1.5 ** 2)) for i in range(11)]
    weight = torch.tensor([[x * y for y in line] for x in line], dtype=torch.float64) / sum(line) ** 2

    def mean(x):
        return (weight * x).sum().item()

    x, y = a[0, :, :, 0], b[0, :, :, 0]
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(a, b) == pytest.approx(expected, rel=1e-9)


def test_quantile():
    assert quantile(torch.arange(1000.0), 0.999) == 998.0 and quantile(torch.tensor([5.0]), 0.5) == 5.0


def test_interpolation_stays_inside_the_points():
    line = [(0.5, 30.0), (0.1, 50.0), (0.3, 40.0)]
    assert interpolate(line, 0.2) == pytest.approx(45.0) and interpolate(line, 0.4) == pytest.approx(35.0)
    assert interpolate(line, 0.5) == 30.0 and interpolate(line, 0.1) == 50.0
    assert interpolate(line, 0.05) is None and interpolate(line, 0.51) is None and interpolate([], 0.1) is None
    assert interpolate([(0.2, 10.0), (0.2, 20.0)], 0.2) == 20.0


def row(case, method, level, skipped, decibel):
    figures = dict.fromkeys(("ssim", "error_mean", "error_max", "dropped_mean", "dropped_q999", "seconds"), 0.0)
    return {"case": case, "method": method, "level": level, "skipped": skipped, "psnr_db": decibel, **figures}


def test_the_frontier_compares_case_by_case():
    rows = [row(c, m, s, s, x - 20 * s) for c, offset in (("a", 0), ("b", 2))
            for m, x in (("Sol-Attn", 40 + offset), ("LiteAttention, x", 43 + offset)) for s in (0.2, 0.8)]
    assert psnr_at(rows, "Sol-Attn", 50) == pytest.approx(31.0)
    found = frontier(rows)
    assert [r["share"] for r in found] == list(range(20, 80, 5))
    assert all(r["lead_db"] == pytest.approx(3.0) for r in found) and "mean +3.0 dB" in verdict(found)
    assert psnr_at(rows[:-1], "LiteAttention, x", 50) is None  # one case has a single point
    assert len(points(rows)) == 4 and all(p["cases"] == 2 for p in points(rows))
    assert "absent" in verdict(frontier([r for r in rows if r["method"] != "Sol-Attn"]))


def loop(q, k, v, keep, setting, backwards):
    """One head in float64 by the words of docs/quality.md, row by row: output, exact mass dropped, kept next."""
    q, k, v = (x.double() for x in (q, k, v))
    tile, seqlen, head_dim = setting.tile, *q.shape
    spans = [range(i, min(i + tile, seqlen)) for i in range(0, seqlen, tile)]
    kbar, vbar = (torch.stack([x[list(s)].mean(0) for s in spans]) for x in (k, v))
    dk, dv = (torch.cat([x[list(s)] - m[i] for i, s in enumerate(spans)]) for x, m in ((k, kbar), (v, vbar)))
    shift, spread = dk.T @ dv / seqlen, dk.T @ dk / seqlen
    scores = q @ k.T * head_dim ** -0.5
    out, dropped = torch.zeros_like(q), torch.zeros(seqlen, dtype=torch.float64)
    stays = torch.zeros_like(keep)
    for i in range(seqlen):
        own = i // tile
        whole = [t for t in range(len(spans)) if len(spans[t]) == tile]
        order = [t for t in (whole[::-1] if backwards else whole) if t != own]
        order = [t for t in [own] if t in whole] + order + [t for t in range(len(spans)) if t not in whole]
        order = [t for t in order if keep[own, t]]
        s2 = (q[i] @ spread @ q[i]).item() / head_dim
        bar = setting.level * math.log(2)
        if setting.pool_skipped and setting.weighted:
            bar = min(bar - math.log(max(1 - math.exp(-s2), 1 / 64)), max(bar, math.log(0.5)))
        met, top = 0.0, -math.inf
        for t in order:
            tile_scores = scores[i, list(spans[t])]
            if setting.criterion == "mass":
                met += tile_scores.exp().sum().item()
                stays[own, t] |= math.log(tile_scores.exp().sum().item() / met) > bar
            else:
                stays[own, t] |= tile_scores.max().item() - top > bar
                top = max(top, tile_scores.max().item())
        kept = [j for t in order for j in spans[t]]
        weights = scores[i, kept].exp()
        numerator, total = weights @ v[kept], weights.sum()
        dropped[i] = 1 - total / scores[i].exp().sum()
        if setting.pool_skipped:
            added = 0.0
            for t in (t for t in range(len(spans)) if not keep[own, t]):
                w = len(spans[t]) * math.exp((q[i] @ kbar[t]).item() * head_dim ** -0.5)
                numerator, total, added = numerator + w * vbar[t], total + w, added + w
            if setting.covariance:
                numerator = numerator + added * math.exp(-s2 / 2) * (q[i] @ shift) * head_dim ** -0.5
        out[i] = numerator / total
    return out, dropped, stays


@pytest.mark.parametrize("changes", [{}, {"covariance": False}, {"weighted": False}, {"pool_skipped": False},
                                     {"criterion": "max", "level": -1.0, "pool_skipped": False}], ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_simulation_against_a_plain_loop(changes, backwards):
    setting = replace(Setting("x", -2.0, tile=16), **changes)
    q, k, v = inputs(seqlen=88, heads=1, scale=0.5)
    keep = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    keep |= torch.eye(6, dtype=torch.bool)
    got = simulate(q, k, v, keep, setting, backwards)
    out, dropped, stays = loop(q[0, 0], k[0, 0], v[0, 0], keep[0, 0], setting, backwards)
    torch.testing.assert_close(got.out[0, 0].double(), out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.dropped[0, 0].double(), dropped, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.dense, DENSE(q, k, v), atol=1e-5, rtol=1e-5)
    assert got.keep[0, 0].equal(stays) and 0 < stays.sum() < keep.sum()
    assert got.skipped == pytest.approx(1 - keep.float().mean().item())


@pytest.mark.parametrize("pool_skipped", [False, True])
def test_nothing_skipped_is_exact_attention(pool_skipped):
    q, k, v = inputs()
    got = simulate(q, k, v, None, Setting("x", -4.0, pool_skipped=pool_skipped))
    torch.testing.assert_close(got.out, DENSE(q, k, v), atol=1e-5, rtol=1e-5)
    assert got.skipped == 0 and got.dropped.abs().max() == 0


@pytest.mark.parametrize("seqlen", [1024, 1000])
@pytest.mark.parametrize("criterion, level, pool_skipped",
                         [("mass", -3.0, True), ("mass", -4.0, False), ("max", -4.0, False)])
def test_simulation_at_128_is_the_real_attention(seqlen, criterion, level, pool_skipped):
    setting = Setting("x", level, tile=128, criterion=criterion, pool_skipped=pool_skipped)
    q, k, v = inputs(seqlen=seqlen, scale=0.7, alike=128)
    mask, keep = SkipMask.full(*q.shape[:3]), None
    for step in range(3):
        before = mask.to_bool()
        out = lite_attention(q, k, v, mask, threshold=level, criterion=criterion, pool_skipped=pool_skipped,
                             backend="torch")
        got = simulate(q, k, v, keep, setting, step % 2 == 1)
        torch.testing.assert_close(got.out, out, atol=2e-5, rtol=2e-5)
        assert got.keep.equal(mask.to_bool()) and got.skipped == pytest.approx(1 - before.float().mean().item())
        keep = got.keep
        q = q + 0.1 * q.roll(1, 2)
    assert 0.05 < 1 - mask.density() < 0.95


def test_measure_gives_exact_attention_and_dropped_mass():
    q, k, v = inputs(seqlen=150)
    keep = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    keep[..., 0] = False
    dense, dropped = measure(q, k, v, keep, 64)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(dense, weights @ v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dropped, weights[..., :64].sum(-1), atol=1e-5, rtol=1e-5)


def test_an_oracle_drops_the_smallest_tiles():
    q, k, v = inputs(seqlen=512)
    got = simulate(q, k, v, None, Setting("x", -3.5, kind="oracle", pool_skipped=False))
    mass = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).unflatten(-1, (8, 64)).sum(-1).unflatten(2, (8, 64)).mean(3)
    share = ((mass > 2 ** -3.5) | torch.eye(8, dtype=torch.bool)).float().mean().item()
    assert got.skipped == pytest.approx(1 - share) and 0 < got.skipped < 1


def test_an_oracle_by_residual_computes_what_pooling_misses():
    q, k, v = inputs(seqlen=512, heads=1, scale=0.3)
    k[..., 128:192, :] = k[..., 128:129, :]  # equal keys: pooling misses nothing
    setting = Setting("x", -18.0, kind="oracle", criterion="residual", tile=64)
    keep = simulate(q, k, v, None, setting).keep[0, 0]
    away = ~keep & ~torch.eye(8, dtype=torch.bool)
    assert away[:, 2].sum() == 7 and away.sum() == 7
    scores = (q @ k.mT * q.shape[-1] ** -0.5).double()[0, 0]
    weights = scores.softmax(-1).unflatten(1, (8, 64))
    exact = torch.einsum("rkt,ktd->rkd", weights, v[0, 0].double().unflatten(0, (8, 64)))
    pooled = (scores.unflatten(1, (8, 64)).mean(-1) - scores.logsumexp(-1, keepdim=True)).exp() * 64
    missed = exact - pooled.unsqueeze(-1) * v[0, 0].double().unflatten(0, (8, 64)).mean(1)
    rms = [x.square().sum(-1).unflatten(0, (8, 64)).mean(1).sqrt() for x in (missed, exact.sum(1, keepdim=True))]
    expected = ((rms[0] / rms[1]) > 2 ** -3.0) | torch.eye(8, dtype=torch.bool)
    got = simulate(q, k, v, None, replace(setting, level=-3.0)).keep[0, 0]
    assert got.equal(expected) and 8 < expected.sum() < 64


def test_cubes_change_the_order_and_nothing_else():
    order = cube_order((3, 8, 12), (2, 4, 8))
    assert order.sort().values.equal(torch.arange(288)) and order[:3].tolist() == [0, 1, 2]
    assert set(order[:64].tolist()) == {t * 96 + r * 12 + c for t in range(2) for r in range(4) for c in range(8)}
    q, k, v = inputs(seqlen=288)
    got = Method(Setting("x", -30.0, cubes=(2, 4, 8)), (3, 8, 12)).attend(q, k, v, 0, 0)
    torch.testing.assert_close(got.out, DENSE(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.dense, got.out, atol=1e-5, rtol=1e-5)


def test_refresh_opens_the_query_tiles_in_turn():
    q, k, v = inputs(seqlen=1024, scale=0.7, alike=128)
    method = Method(Setting("x", -3.0, tile=128, refresh=4), (1, 1, 1024))
    plain = Method(Setting("x", -3.0, tile=128), (1, 1, 1024))
    for step in range(2):
        opened, usual = (m.attend(q, k, v, 0, step) for m in (method, plain))
    assert usual.skipped > opened.skipped > usual.skipped - 2 / 8 - 1e-6


def test_warm_up_and_restart():
    q, k, v = inputs(seqlen=1024, scale=0.7, alike=128)
    for kind in ("simulation", "kernel"):
        usual, warm, again = (Method(Setting("x", -3.0, tile=128, kind=kind, **changes), (1, 1, 1024))
                              for changes in ({}, {"warmup": 2}, {"restart": 2}))
        shares = [[m.attend(q, k, v, 0, step).skipped for step in range(4)] for m in (usual, warm, again)]
        assert shares[0][0] == 0 < shares[0][1] and shares[1][:2] == [0, 0]
        assert shares[1][2] == shares[0][1] == shares[2][1] == shares[2][3] and shares[2][2] == 0


@pytest.mark.skipif(sol_attention()[0] is None, reason=sol_attention()[1])
@pytest.mark.parametrize("seqlen", [512, 470])
@pytest.mark.parametrize("tau", [-0.5, 1.0])
def test_sol_routes_are_those_of_the_reference(seqlen, tau):
    q, k, _ = inputs(seqlen=seqlen, scale=0.5)
    blocks = -(-seqlen // BLOCK)
    # Without its pooled term, values that name their block show which blocks a row has met.
    v = torch.eye(64)[torch.arange(seqlen) // BLOCK].expand(1, 2, -1, -1)
    out = sol_attention()[0](*(x.transpose(1, 2) for x in (q, k, v)), tau=tau, tail=False).transpose(1, 2)
    met = torch.stack([x.amax(2) for x in (out[..., :blocks] > 0).split(BLOCK, 2)], 2)
    routes = sol_routes(q, k, tau)
    assert routes.equal(met) and 0 < routes.float().mean() < 1


@pytest.mark.parametrize("pool_skipped", [False, True])
def test_no_token_of_a_trained_model_loses_more_than_the_budget(trained, pool_skipped):
    """With pooled keys: of the fraction that pooling loses of its attention."""
    skipped = 0
    for q, k in trained:
        lost = 1.0
        if pool_skipped:
            queries = q * q.shape[-1] ** -0.5
            variance = ((queries @ pool_tiles(k, k).spread) * queries).sum(-1).clamp_min(0)
            lost = (1 - (-variance).exp()).clamp(LOST_MIN, 1)
        for budget in (0.05, 0.3):
            mask = SkipMask.full(*q.shape[:3])
            lite_attention(q, k, k, mask, threshold=math.log2(budget / math.ceil(q.shape[2] / 128)), criterion="mass",
                           pool_skipped=pool_skipped, backend="torch")
            dropped = measure(q, k, k, mask.to_bool(), 128)[1]
            assert (dropped * lost).max() <= budget * (1 + 1e-3)
            skipped += 1 - mask.density()
    assert skipped > 0.1
