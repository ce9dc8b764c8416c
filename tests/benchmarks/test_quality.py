"""The quality lab: its figures, and its simulation against a plain loop and against the pack's own kernels."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.quality_candidates import CANDIDATES, PARTS, EqualError, Rerecorded, RerecordedWhereMoved, Simulated
from support.quality_cases import CASES, SMALL_CASES
from support.quality_methods import Rules, simulate
from support.quality_metrics import interpolate, ssim
from support.quality_report import at, has_lost, lead, spread
from support.quality_runs import Setting, evaluations, run_setting, sample, trace, warmup
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
    trace(CASES[8], 3, "cpu", [0, 1, 2, 3, 4], [1], path)
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


def test_interpolation_stays_inside_the_points():
    line = [(0.5, 30.0), (0.1, 50.0), (0.3, 40.0)]
    assert interpolate(line, 0.2) == pytest.approx(45.0) and interpolate(line, 0.4) == pytest.approx(35.0)
    assert interpolate(line, 0.5) == 30.0 and interpolate(line, 0.1) == 50.0
    assert interpolate(line, 0.05) is None and interpolate(line, 0.51) is None and interpolate([], 0.1) is None
    assert interpolate([(0.2, 10.0), (0.2, 20.0)], 0.2) == 20.0


def test_curves_are_compared_case_by_case():
    rows = [{"case": c, "method": m, "skipped": s, "psnr_db": x - 20 * s} for c, offset in (("a", 0), ("b", 2))
            for m, x in (("peer", 40 + offset), ("own", 43 + 2 * offset)) for s in (0.2, 0.8)]
    assert at(rows, "a", "peer", 0.5) == pytest.approx(30.0) and at(rows, "a", "peer", 0.1) is None
    assert lead(rows, "b", 0.5, "own", "peer") == pytest.approx(5.0)
    assert lead(rows, "b", 0.5, "own", "peer", over_share=0.3) == pytest.approx(1.0)
    assert lead(rows[:-1], "b", 0.5, "own", "peer") is None  # a single point is no curve
    budget = [dict(r, method="error budget") for r in rows if r["method"] == "peer"]
    close, far = ({"case": "a", "method": "re-recorded at half", "skipped": 0.5, "psnr_db": x} for x in (27.8, 27.7))
    assert has_lost([*budget, far], "re-recorded at half") and not has_lost([*budget, close], "re-recorded at half")
    assert at(budget, "a", "error budget", 0.4) == pytest.approx(30.0)  # halfway on a logarithmic scale
    assert spread([3.0, None, 1.0, 5.0]) == "1.0 / 3.0 / 5.0 (3)" and spread([None]) == ""


def loop(q, k, v, keep, level, rules, backwards):
    """One head in float64 by the words of docs/quality.md, row by row: output, kept next."""
    q, k, v = (x.double() for x in (q, k, v))
    tile, seqlen, head_dim = rules.key_tile, *q.shape
    spans = [range(i, min(i + tile, seqlen)) for i in range(0, seqlen, tile)]
    kbar, vbar = (torch.stack([x[list(s)].mean(0) for s in spans]) for x in (k, v))
    dk, dv = (torch.cat([x[list(s)] - m[i] for i, s in enumerate(spans)]) for x, m in ((k, kbar), (v, vbar)))
    shift, spread = dk.T @ dv / seqlen, dk.T @ dk / seqlen
    scores = q @ k.T * head_dim ** -0.5
    out, stays = torch.zeros_like(q), torch.zeros_like(keep)
    for i in range(seqlen):
        own = i // rules.tile
        near = [t for t in range(len(spans)) if spans[t].start // rules.tile == own]
        whole = [t for t in range(len(spans)) if len(spans[t]) == tile]
        order = [t for t in (whole[::-1] if backwards else whole) if t not in near]
        order = [t for t in near if t in whole] + order + [t for t in range(len(spans)) if t not in whole]
        order = [t for t in order if keep[own, t]]
        s2 = (q[i] @ spread @ q[i]).item() / head_dim
        bars = [x * math.log(2) for x in (level, level if rules.criterion == "max" else rules.second)]
        if rules.pool_skipped and rules.weighted:
            bars = [min(bar - math.log(max(1 - math.exp(-s2), 1 / 64)), max(bar, math.log(0.5))) for bar in bars]
        met, top = 0.0, -math.inf
        for t in order:
            tile_scores = scores[i, list(spans[t])]
            met += tile_scores.exp().sum().item()
            by_mass = math.log(tile_scores.exp().sum().item() / met) > bars[0]
            by_max = tile_scores.max().item() - top > bars[1]
            top = max(top, tile_scores.max().item())
            stays[own, t] |= {"mass": by_mass, "max": by_max, "both": by_mass or by_max,
                              "either": by_mass and by_max}[rules.criterion]
        kept = [j for t in order for j in spans[t]]
        weights = scores[i, kept].exp()
        numerator, total = weights @ v[kept], weights.sum()
        if rules.pool_skipped:
            added = 0.0
            for t in (t for t in range(len(spans)) if not keep[own, t]):
                w = len(spans[t]) * math.exp((q[i] @ kbar[t]).item() * head_dim ** -0.5 + min(s2 / 2, rules.mass_cap))
                numerator, total, added = numerator + w * vbar[t], total + w, added + w
            if rules.covariance:
                numerator = numerator + added * math.exp(-s2 / 2) * (q[i] @ shift) * head_dim ** -0.5
        out[i] = numerator / total
    return out, stays


@pytest.mark.parametrize("changes", [{}, {"covariance": False}, {"weighted": False}, {"pool_skipped": False},
                                     {"key_tile": 8}, {"mass_cap": 0.1}, {"criterion": "max", "pool_skipped": False},
                                     {"criterion": "both", "second": -1.0}, {"criterion": "either", "second": -1.0}],
                         ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_simulation_against_a_plain_loop(changes, backwards):
    rules, level = Rules(**{"tile": 16, "key_tile": 16, **changes}), -1.0 if "max" in changes.values() else -2.0
    q, k, v = inputs(seqlen=88, heads=1, scale=0.5)
    keep = torch.rand(1, 1, 6, 96 // rules.key_tile, generator=torch.Generator().manual_seed(2)) < 0.7
    keep |= torch.eye(6, dtype=torch.bool).repeat_interleave(16 // rules.key_tile, 1)
    keep = keep[..., :-(-88 // rules.key_tile)]
    got = simulate(q, k, v, keep, torch.full((1, 1), level), rules, backwards)
    out, stays = loop(q[0, 0], k[0, 0], v[0, 0], keep[0, 0], level, rules, backwards)
    torch.testing.assert_close(got.out[0, 0].double(), out, atol=2e-5, rtol=2e-5)
    assert got.keep[0, 0].equal(stays) and 0 < stays.sum() < keep.sum() and got.computed is keep


@pytest.mark.parametrize("pool_skipped", [False, True])
def test_nothing_skipped_is_exact_attention(pool_skipped):
    q, k, v = inputs()
    got = simulate(q, k, v, None, torch.full((1, 2), -4.0), Rules(pool_skipped=pool_skipped))
    torch.testing.assert_close(got.out, DENSE(q, k, v), atol=1e-5, rtol=1e-5)
    assert got.computed.all()


@pytest.mark.parametrize("seqlen", [1024, 1000])
@pytest.mark.parametrize("criterion, level, pool_skipped",
                         [("mass", -3.0, True), ("mass", -4.0, False), ("max", -4.0, False)])
def test_simulation_is_the_real_attention(seqlen, criterion, level, pool_skipped):
    rules = Rules(criterion=criterion, pool_skipped=pool_skipped)
    q, k, v = inputs(seqlen=seqlen, scale=0.7, alike=128)
    mask, keep = SkipMask.full(*q.shape[:3]), None
    for step in range(3):
        before = mask.to_bool()
        out = lite_attention(q, k, v, mask, threshold=level, criterion=criterion, pool_skipped=pool_skipped,
                             backend="torch")
        got = simulate(q, k, v, keep, torch.full((1, 2), level), rules, step % 2 == 1)
        torch.testing.assert_close(got.out, out, atol=2e-5, rtol=2e-5)
        assert got.keep.equal(mask.to_bool()) and got.computed.equal(before)
        keep = got.keep
        q = q + 0.1 * q.roll(1, 2)
    assert 0.05 < 1 - mask.density() < 0.95


def shares(method, calls, change=0.0):
    """Computed shares of each call on inputs that move by `change` from call to call."""
    q, k, v = inputs(seqlen=1024, scale=0.7, alike=128)
    found = []
    for number in range(calls):
        found.append(method.attend(q, k, v, 0, number))
        q = q + change * q.roll(128, 2)
    return [x.computed.float().mean().item() for x in found]


def test_re_recording_starts_anew_where_the_pattern_moved():
    plain, again = (shares(method(1.0, 6), 6) for method in (Simulated, Rerecorded))
    assert again[:3] == plain[:3] and again[3] == 1 and plain[3] < 1
    still, moved = (shares(RerecordedWhereMoved(1.0, 6, 0.3), 6, change) for change in (0.0, 3.0))
    assert still[3] < 1 and moved[3] > still[3]
    assert plain[2] < still[2] < plain[2] + 1 / 8 + 1e-6  # an eighth of the query tiles is judged anew


def test_equal_error_gives_each_head_the_boldest_budget_within_its_error():
    q, k, v = inputs(seqlen=1024, scale=0.7, alike=128)
    q[:, 1] *= 0.05  # a head that spreads its attention: pooling loses nothing there
    levels = EqualError(0.05, 6).choose_levels(q, k, v)
    assert levels[0, 1] == math.log2(4.0 / 8) and levels[0, 0] < levels[0, 1]


def test_every_candidate_and_part_runs_and_skips():
    case = SMALL_CASES[1]
    for name in {**CANDIDATES, **PARTS}:
        latent, skipped = run_setting(case, Setting(name, "simulation", 0.5), "cpu")
        assert torch.isfinite(latent).all() and 0 <= skipped < 1


def test_both_halves_have_both_models_and_samplers_and_few_steps():
    assert len(CASES) == 12 == len({c.name for c in CASES}) and max(c.tokens for c in CASES) >= 5000
    assert {c.steps for c in CASES} >= {4, 8, 20}
    for half in ("choosing", "reporting"):
        own = [c for c in CASES if c.half == half]
        assert len(own) == 6 and {c.model for c in own} == {"shapes", "pans"}
        assert {c.sampler for c in own} == {"euler", "heun"} and min(c.steps for c in own) <= 8
        assert len({c.cfg for c in own}) >= 3 and len({c.shift for c in own}) >= 3


def test_heun_evaluates_every_step_twice_but_the_last():
    case, seen = SMALL_CASES[1], []
    latent = sample(case, "cpu", lambda step, *_: seen.append(step))
    assert seen == [0, 0, 1, 1, 2] and len(seen) == evaluations(case, 3) and warmup(case) == 2
    assert not latent.allclose(sample(replace(case, sampler="euler"), "cpu"))


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
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            away = (~mask.to_bool()).repeat_interleave(128, 2).repeat_interleave(128, 3)
            dropped = (weights * away[:, :, :q.shape[2], :q.shape[2]]).sum(-1)
            assert (dropped * lost).max() <= budget * (1 + 1e-3)
            skipped += 1 - mask.density()
    assert skipped > 0.1
