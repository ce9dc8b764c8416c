"""Both backends against the float64 oracle, and against each other."""

import math

import kernel_oracle as oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liteattention.kernels import MustKeep, SkipMask, lite_attention, tiles

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
BOUND = {F16: (5e-3, 1e-3), F32: (3e-5, 3e-6), BF16: (3e-2, 8e-3)}
"""(largest absolute error, relative L2 error) against float64 for unit-variance v."""
MARGIN = 2e-3
"""log2; decisions closer to the threshold than this may differ between float32 and float64 scores."""

# (batch, heads, n_q, n_k, head_dim, dtype, layout)
CASES = [
    (1, 2, 512, 512, 64, F16, "strided"),
    (1, 2, 300, 300, 128, F16, "fused"),
    (2, 1, 385, 385, 96, F16, "strided"),
    (1, 1, 300, 300, 128, F32, "contiguous"),
    (1, 2, 130, 700, 64, F32, "strided"),
    (1, 1, 640, 200, 96, F32, "strided"),
    (1, 1, 100, 100, 64, F32, "strided"),
    (2, 2, 1, 1, 64, F16, "strided"),
    (1, 1, 1, 400, 128, F32, "contiguous"),
    (1, 1, 300, 300, 64, BF16, "strided"),
]


def ids(case):
    return "x".join(str(x).removeprefix("torch.") for x in case)


def run(backend, device, inputs, mask, **options):
    """Output and lse in float64 on the CPU."""
    inputs = [x.to(device if backend == "triton" else "cpu") for x in inputs]
    out, lse = lite_attention(*inputs, mask, backend=backend, return_lse=True, **options)
    assert out.shape == inputs[0].shape and out.dtype == inputs[0].dtype and lse.dtype == F32
    return out.double().cpu(), lse.double().cpu()


def check(out, lse, expected, dtype):
    largest, relative = BOUND[dtype]
    assert (out - expected.out).abs().max() <= largest
    assert (out - expected.out).norm() <= relative * expected.out.norm() + 1e-9
    assert torch.equal(lse == -math.inf, expected.lse == -math.inf)
    seen = expected.lse > -math.inf
    assert torch.allclose(lse[seen], expected.lse[seen], atol=2e-5, rtol=2e-5)


def same_decisions(got, expected):
    clear = expected.margin > MARGIN
    assert torch.equal(got[clear], expected.keep[clear])
    assert not (got & ~(expected.keep | ~clear)).any()


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_result_and_decisions_over_three_passes(backend, device, interpreted, case):
    batch, heads, n_q, n_k, d, dtype, layout = case
    if dtype is BF16 and backend == "triton" and interpreted:
        pytest.skip("the interpreter of Triton 3.6 computes bfloat16 products wrongly")
    start = oracle.holes(batch, heads, n_q, n_k, 0.8)
    place = device if backend == "triton" else "cpu"
    mask = SkipMask.from_bool(start, n_q, n_k).to(place)
    dropped = 0
    for number in range(3):
        inputs = oracle.make(batch, heads, n_q, n_k, d, dtype, layout, seed=number)
        before = mask.to_bool().cpu()
        expected = oracle.attention(*inputs, before, -4.0, backwards=number % 2 == 1)
        out, lse = run(backend, device, inputs, mask, threshold=-4.0)
        check(out, lse, expected, dtype)
        after = mask.to_bool().cpu()
        assert not (after & ~before).any(), "the mask only shrinks"
        same_decisions(after, expected)
        dropped += (before & ~after).sum().item()
        assert mask.passes == [number + 1] * batch
    if min(tiles(n_q), tiles(n_k)) > 1 and n_k > 256:
        assert dropped > 0, "data that drops nothing proves nothing"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_q=st.integers(1, 700), n_k=st.integers(1, 700), d=st.sampled_from([64, 96, 128]), seed=st.integers(0, 999),
       threshold=st.sampled_from([0.0, -0.5, -3.0, -9.0]), density=st.floats(0, 1), backwards=st.booleans())
def test_torch_on_any_shape(n_q, n_k, d, seed, threshold, density, backwards):
    inputs = oracle.make(1, 1, n_q, n_k, d, F32, seed=seed)
    start = oracle.holes(1, 1, n_q, n_k, density, seed)
    mask = SkipMask.from_bool(start, n_q, n_k)
    mask.passes = [int(backwards)]
    expected = oracle.attention(*inputs, start, threshold, backwards)
    out, lse = run("torch", "cpu", inputs, mask, threshold=threshold)
    check(out, lse, expected, F32)
    same_decisions(mask.to_bool(), expected)


@pytest.mark.parametrize("n", [512, 300])
@pytest.mark.parametrize("d", [64, 96])
def test_packed_layout_gives_the_same_bits_and_bytes(backend, device, n, d):
    place = device if backend == "triton" else "cpu"
    split = [x.to(place) for x in oracle.make(1, 2, n, n, d, F16)]
    packed = [x.transpose(1, 2).flatten(2) for x in split]
    masks = [SkipMask.full(1, 2, n, device=place) for _ in range(2)]
    a = lite_attention(*split, masks[0], threshold=-4.0, backend=backend)
    b = lite_attention(*packed, masks[1], threshold=-4.0, heads=2, backend=backend)
    assert b.shape == packed[0].shape and b.is_contiguous()
    assert a.transpose(1, 2).flatten(2).data_ptr() == a.data_ptr(), "the packed view of the result is free"
    assert torch.equal(a.transpose(1, 2).flatten(2), b)
    assert torch.equal(masks[0].words, masks[1].words) and masks[0].density() < 1


def test_softmax_scale_and_wide_rows(backend, device):
    place = device if backend == "triton" else "cpu"
    wide = torch.randn(1, 300, 2, 3 * 128, generator=torch.Generator().manual_seed(0)).to(F16).to(place)
    wide[..., 0] += 8
    wide[..., 128] += oracle.strengths(300).view(1, -1, 1).to(wide)
    q, k, v = (wide[..., i * 128:i * 128 + 64].transpose(1, 2) for i in range(3))
    mask = SkipMask.full(1, 2, 300, device=place)
    expected = oracle.attention(*(x.cpu() for x in (q, k, v)), mask.to_bool().cpu(), -4.0, sm_scale=0.2)
    out, lse = lite_attention(q, k, v, mask, threshold=-4.0, sm_scale=0.2, backend=backend, return_lse=True)
    check(out.double().cpu(), lse.double().cpu(), expected, F16)
    same_decisions(mask.to_bool().cpu(), expected)
    assert mask.density() < 1


def test_threshold_zero_keeps_only_what_raises_the_maximum(backend, device):
    place = device if backend == "triton" else "cpu"
    inputs = oracle.make(1, 2, 500, 500, 64, F16)
    mask = SkipMask.full(1, 2, 500, device=place)
    expected = oracle.attention(*inputs, mask.to_bool().cpu(), 0.0)
    run(backend, device, inputs, mask, threshold=0.0)
    same_decisions(mask.to_bool().cpu(), expected)
    assert 0 < mask.density() < 0.7


@pytest.mark.parametrize("threshold, kept", [(-4.0, [True, False, True, True]), (0.0, [True, False, False, False])])
def test_a_tile_exactly_at_the_threshold_is_dropped(backend, device, threshold, kept):
    """Integer scores and a scale of ln 2, so that no rounding decides: only what is above the threshold stays."""
    place = device if backend == "triton" else "cpu"
    q, k = torch.zeros(1, 1, 128, 64, dtype=F16), torch.zeros(1, 1, 512, 64, dtype=F16)
    q[..., 0] = 1
    k[..., 0] = torch.tensor([8, 4, 5, 8]).repeat_interleave(128)
    mask = SkipMask.full(1, 1, 128, 512, device=place)
    run(backend, device, (q, k, k), mask, threshold=threshold, sm_scale=math.log(2))
    assert mask.to_bool().flatten().tolist() == kept


def test_masks_wider_than_one_word(backend, device):
    """35 key tiles: decisions of both words, ascending and descending, with holes and a partial last tile."""
    n_q, n_k = 130, 34 * 128 + 37
    place = device if backend == "triton" else "cpu"
    start = oracle.holes(1, 1, n_q, n_k, 0.8)
    mask = SkipMask.from_bool(start, n_q, n_k).to(place)
    assert mask.words.shape[-1] == 2
    for number in range(2):
        inputs = oracle.make(1, 1, n_q, n_k, 64, F16, seed=number)
        before = mask.to_bool().cpu()
        expected = oracle.attention(*inputs, before, -4.0, backwards=number == 1)
        out, lse = run(backend, device, inputs, mask, threshold=-4.0)
        check(out, lse, expected, F16)
        after = mask.to_bool().cpu()
        same_decisions(after, expected)
        assert (before & ~after).any() and after[..., 32:].any()
    assert (start & ~after)[..., 32:].any(), "data that drops nothing in the second word proves nothing about it"


def test_must_keep_tiles_stay(backend, device):
    n = 700
    place = device if backend == "triton" else "cpu"
    keep = MustKeep(keys=((250, 300),), queries=((0, 1),))
    mask = SkipMask.full(1, 2, n, device=place)
    free = SkipMask.full(1, 2, n, device=place)
    for number in range(2):
        inputs = [x.to(place) for x in oracle.make(1, 2, n, n, 64, F16, seed=number)]
        lite_attention(*inputs, mask, threshold=-1.0, must_keep=keep, backend=backend)
        lite_attention(*inputs, free, threshold=-1.0, backend=backend)
    must = keep.tile_mask(n, n)
    bits, without = mask.to_bool().cpu(), free.to_bool().cpu()
    assert bits[..., must].all()
    assert not without[..., must].all(), "without the ranges some of these tiles do drop"
    assert torch.equal(bits[..., ~must], without[..., ~must]), "the other tiles do not notice"


def test_must_keep_brings_nothing_back(backend, device):
    place = device if backend == "triton" else "cpu"
    mask = SkipMask.from_bool(torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3), 300, 300).to(place)
    inputs = [x.to(place) for x in oracle.make(1, 1, 300, 300, 64, F16)]
    lite_attention(*inputs, mask, threshold=-1.0, must_keep=MustKeep(keys=((0, 300),)), backend=backend)
    assert torch.equal(mask.to_bool()[0, 0].cpu(), torch.eye(3, dtype=torch.bool))


def test_rows_of_different_age_in_one_batch(backend, device):
    """Each batch row brings its own mask and direction; batching rows anew changes nothing."""
    n = 640
    place = device if backend == "triton" else "cpu"
    together = [SkipMask.full(1, 2, n, device=place) for _ in range(2)]
    apart = [SkipMask.full(1, 2, n, device=place) for _ in range(2)]
    for number, rows in enumerate([[0, 1], [1], [1, 0], [0, 1]]):
        inputs = [x.to(place) for x in oracle.make(len(rows), 2, n, n, 64, F16, seed=number)]
        out = lite_attention(*inputs, [together[r] for r in rows], threshold=-3.0, backend=backend)
        for i, r in enumerate(rows):
            alone = lite_attention(*(x[i:i + 1] for x in inputs), apart[r], threshold=-3.0, backend=backend)
            assert torch.equal(out[i:i + 1], alone)
        for a, b in zip(together, apart, strict=True):
            assert torch.equal(a.words, b.words) and a.passes == b.passes
    assert together[0].passes == [3] and together[1].passes == [4]
    assert together[0].density() < 1 and not torch.equal(together[0].words, together[1].words)


@pytest.mark.parametrize("n", [640, 700])
def test_triton_and_torch_make_the_same_masks(device, n):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    masks = {"torch": SkipMask.full(2, 2, n), "triton": SkipMask.full(2, 2, n, device=device)}
    for number in range(4):
        inputs = oracle.make(2, 2, n, n, 64, F16, seed=number)
        before = masks["torch"].to_bool()
        margins = oracle.attention(*inputs, before, -4.0, backwards=number % 2 == 1).margin
        assert margins.min() > MARGIN, "choose another seed: a decision is too close to call bit for bit"
        outs = {name: run(name, device, inputs, mask, threshold=-4.0)[0] for name, mask in masks.items()}
        assert torch.equal(masks["torch"].words, masks["triton"].words.cpu())
        assert (outs["torch"] - outs["triton"]).abs().max() < 2e-3
    assert masks["torch"].density() < 0.9


def test_triton_and_torch_agree_on_rows_of_different_age(device):
    """Three rows of age 0, 1 and 2 with holes of their own in one call, bit for bit over two passes."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    n = 512
    starts = [oracle.holes(1, 1, n, n, 0.9, seed) for seed in (1, 2, 3)]
    masks = {}
    for name, place in (("torch", "cpu"), ("triton", device)):
        masks[name] = [SkipMask.from_bool(s, n, n).to(place) for s in starts]
        for age, mask in enumerate(masks[name]):
            mask.passes = [age]
    for number in range(2):
        inputs = oracle.make(3, 1, n, n, 64, F16, seed=number)
        before = torch.cat([m.to_bool() for m in masks["torch"]])
        backwards = [m.passes[0] % 2 == 1 for m in masks["torch"]]
        expected = oracle.attention(*inputs, before, -3.0, backwards)
        assert backwards == [number == 1, number == 0, number == 1]
        assert expected.margin.min() > MARGIN, "choose another seed: a decision is too close to call bit for bit"
        for name, rows in masks.items():
            out, lse = run(name, device, inputs, rows, threshold=-3.0)
            check(out, lse, expected, F16)
            assert torch.equal(torch.cat([m.to_bool() for m in rows]).cpu(), expected.keep)
    assert [m.passes for m in masks["triton"]] == [[2], [3], [4]]
    assert expected.keep.sum() < sum(s.sum() for s in starts)
    other_way = oracle.attention(*inputs, before, -3.0, [not b for b in backwards])
    assert not torch.equal(other_way.keep, expected.keep), "data on which the direction decides nothing"
