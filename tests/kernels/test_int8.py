"""INT8 calls: against float64 attention over the dequantised operands, and what quantising may do to decisions."""

import math

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import SkipMask, Workspace, lite_attention, precision_choice
from liteattention.kernels.precision import AUTO_INT8_MIN_TOKENS, INT8_GUARD

pytest.importorskip("triton", reason="Triton is not installed on this system")
TILE = 128


def by_tile(x):
    """[B, H, N, D] -> list of its 128-token tiles."""
    return x.split(TILE, 2)


def dequantised(q, k, v, v_fp16):
    """What an int8 call is to compute with, in float64: rounding as documented, by other code than the kernel's."""
    def int8(x, axes):
        scale = x.abs().amax(axes, keepdim=True) / 127
        return (x / scale).round() * scale

    q, k, v = (x.double() for x in (q, k, v))
    k = k - k.mean(2, keepdim=True)
    power = balance_of(q, k)
    q = int8(q / power, -1) * power
    k = torch.cat([int8(x, (-1, -2)) for x in by_tile(k * power)], 2) / power
    if v_fp16:
        scales = [2.0 ** (x.abs().amax((-1, -2), keepdim=True) / 512).log2().ceil() for x in by_tile(v)]
        v = torch.cat([(x / s).half().double() * s for x, s in zip(by_tile(v), scales, strict=True)], 2)
    return q, k, v


def balance_of(q, k):
    """The power of two that takes half of what a channel of q stands out by, from twice the mean on, to k."""
    q_size, k_size = q[:, :, :512].abs().mean(2, keepdim=True), k.pow(2).mean(2, keepdim=True).sqrt()
    q_ratio, k_ratio = (torch.log2(x / x.mean(-1, keepdim=True)) for x in (q_size, k_size))
    return 2.0 ** (((q_ratio - 1).clamp(min=0) - k_ratio.clamp(min=0)) / 2).round()


def run(inputs, mask, device, config=None, backwards=False, threshold=-4.0):
    from liteattention.kernels.triton_launch import triton_attention

    inputs = [x.to(device) for x in inputs]
    out = torch.empty_like(inputs[0])
    triton_attention(*inputs, out, None, [(mask, r) for r in range(mask.batch)], [backwards] * mask.batch, threshold,
                     True, None, inputs[0].shape[-1] ** -0.5, Workspace(), None, int8=True,
                     config=config)
    return out.double().cpu()


def configs():
    from liteattention.kernels.launch_table import LaunchConfig

    return {"float16 P·V": LaunchConfig(pv_fp16=True), "by tile": LaunchConfig(record_in_registers=False),
            "128x128 descriptors": LaunchConfig(BLOCK_N=128, record_in_registers=False, tma=True)}


@pytest.mark.parametrize("name", configs())
@pytest.mark.parametrize("batch, heads, n_q, n_k, d", [(1, 2, 512, 512, 64), (1, 1, 300, 300, 128),
                                                      (2, 1, 385, 130, 96), (1, 2, 100, 640, 128)])
def test_against_float64_over_the_dequantised_operands(device, name, batch, heads, n_q, n_k, d):
    config = configs()[name]
    start = oracle.holes(batch, heads, n_q, n_k, 0.8)
    mask = SkipMask.from_bool(start, n_q, n_k).to(device)
    inputs = oracle.make(batch, heads, n_q, n_k, d, torch.float16)
    expected = oracle.attention(*dequantised(*inputs, config.pv_fp16), start, -2.0 - INT8_GUARD, backwards=True)
    out = run(inputs, mask, device, config, backwards=True, threshold=-2.0)
    assert (out - expected.out).abs().max() < 2e-2
    assert (out - expected.out).norm() < 4e-3 * expected.out.norm()
    clear = expected.margin > 5e-3
    got = mask.to_bool().cpu()
    assert torch.equal(got[clear], expected.keep[clear])
    if n_q > TILE and n_k > 2 * TILE:
        assert expected.keep.sum() < start.sum(), "data that drops nothing proves nothing"


@pytest.mark.parametrize("d", [64, 128])
def test_close_to_full_precision(device, d):
    """The error that INT8 itself brings, on data with a strong common direction in k (what smoothing is for)."""
    inputs = oracle.make(1, 2, 512, 512, d, torch.float16)
    inputs[1][...] += 3 * torch.randn(d, generator=torch.Generator().manual_seed(1)).half()
    exact = oracle.attention(*inputs, torch.ones(1, 2, 4, 4, dtype=torch.bool), -30.0).out
    out = run(inputs, SkipMask.full(1, 2, 512, device=device), device, threshold=-30.0)
    assert (out - exact).norm() < 3e-2 * exact.norm()


def rotated(x, size):
    """x with a pair of channels that rotary embedding turns from token to token."""
    angle = 0.3 * torch.arange(x.shape[2])
    pair = torch.stack([angle.cos(), angle.sin()], -1) * size
    return torch.cat([x[..., :5], x[..., 5:7] + pair, x[..., 7:]], -1)


def channel(x, factor=1.0, shift=0.0):
    """x with one channel that is larger, or far from zero."""
    return torch.cat([x[..., :5], x[..., 5:6] * factor + shift, x[..., 6:]], -1)


def token(x, factor):
    return torch.cat([x[:, :, :200], x[:, :, 200:201] * factor, x[:, :, 201:]], 2)


@pytest.mark.parametrize("changed, bound", [
    (lambda q, k, v: (q, k, v), 1.3e-2),
    (lambda q, k, v: (4 * q, 4 * k, v), 5.2e-2),
    (lambda q, k, v: (8 * q, 8 * k, v), 9e-2),
    (lambda q, k, v: (token(q, 50), k, v), 1.2e-2),
    (lambda q, k, v: (q, token(k, 50), v), 3e-2),
    (lambda q, k, v: (channel(q, factor=20), k, v), 2.5e-2),
    (lambda q, k, v: (q, channel(k, factor=20), v), 3e-2),
    (lambda q, k, v: (channel(q, shift=40), k, v), 2.8e-2),
    (lambda q, k, v: (q, channel(k, shift=40), v), 1.3e-2),
    (lambda q, k, v: (rotated(q, 40), k, v), 3e-2),
    (lambda q, k, v: (rotated(q, 40), rotated(k, 40), v), 1.8e-1),
    (lambda q, k, v: (q, k, v * torch.tensor([1.0, 1e-3, 1e3])[torch.arange(384) // TILE, None]), 1.3e-2),
], ids=["unit variance", "norms x4", "norms x8", "query token x50", "key token x50", "channel of q x20",
        "channel of k x20", "channel of q +40", "channel of k +40", "rotated pair of q", "rotated pair of q and k",
        "v from 1e-3 to 1e3"])
def test_outliers(device, changed, bound):
    """Relative error where INT8 has few steps left for most elements: a tile or row is as coarse as its largest one."""
    generator = torch.Generator().manual_seed(0)
    inputs = [x.half() for x in changed(*(torch.randn(1, 2, 384, 128, generator=generator) for _ in range(3)))]
    exact = oracle.attention(*inputs, torch.ones(1, 2, 3, 3, dtype=torch.bool), -30.0).out
    out = run(inputs, SkipMask.full(1, 2, 384, device=device), device, threshold=-30.0)
    error = (out - exact).norm() / exact.norm()
    assert error < bound


def test_a_large_query_token_leaves_the_other_rows_as_they_were(device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 384, 128, generator=generator).half() for _ in range(3))
    plain, large = (run([x, k, v], SkipMask.full(1, 2, 384, device=device), device, threshold=-30.0)
                    for x in (q, token(q, 50)))
    others = torch.arange(384) != 200
    assert torch.equal(plain[:, :, others], large[:, :, others])


def test_a_tile_that_full_precision_keeps_is_kept(device):
    """The guard: no decision of INT8 drops a tile that exact scores keep at the threshold asked for."""
    dropped = droppable = 0
    for seed in range(4):
        inputs = oracle.make(1, 2, 640, 640, 128, torch.float16, seed=seed)
        exact = oracle.attention(*inputs, torch.ones(1, 2, 5, 5, dtype=torch.bool), -4.0).keep
        mask = SkipMask.full(1, 2, 640, device=device)
        run(inputs, mask, device)
        got = mask.to_bool().cpu()
        assert not (exact & ~got).any()
        dropped += (~got).sum().item()
        droppable += (~exact).sum().item()
    assert dropped > 0.4 * droppable > 10, "the guard costs tiles, not all of them"


def test_scores_stray_less_than_the_guard_allows():
    """Largest error of an INT8 score for unit variance at head_dim 128, in log2: half the guard covers it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 128, generator=generator) for _ in range(3))
    q8, k8, _ = dequantised(q, k, v, False)
    k = k - k.mean(2, keepdim=True)
    error = ((q.double() @ k.double().mT) - q8 @ k8.mT).abs().max() * 128 ** -0.5 / math.log(2)
    assert 2 * error < INT8_GUARD


@pytest.mark.parametrize("size", [1e-4, 1.0, 900.0, 6e4])
def test_values_of_any_range_do_not_overflow(device, size):
    """float16 sums of P·V stay finite: v is scaled tile by tile, neighbours of very different size included."""
    q, k, v = oracle.make(1, 1, 384, 384, 64, torch.float32)
    v = v.sign() * size * torch.tensor([1.0, 1e-3, 1.0])[torch.arange(384) // TILE].view(1, 1, -1, 1)
    inputs = [x.to(torch.float16) for x in (q * 0, k, v)]  # equal weights: the largest sums there can be
    out = run(inputs, SkipMask.full(1, 1, 384, device=device), device, configs()["float16 P·V"], threshold=-30.0)
    exact = inputs[2].double().mean(2, keepdim=True).expand_as(out)
    assert torch.isfinite(out).all()
    assert (out - exact).abs().max() < 4e-3 * inputs[2].double().abs().mean() + 1e-7


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(device, where, value):
    inputs = list(oracle.make(1, 2, 384, 384, 64, torch.float16))
    inputs["qkv".index(where)][0, 0, 200, 3] = value
    mask = SkipMask.full(1, 2, 384, device=device)
    out = run(inputs, mask, device, configs()["float16 P·V"])
    bad = {"q": out[0, 0, 200], "k": out[0, 0], "v": out[0, 0, :, 3]}[where]
    assert not bad.isfinite().any() if where != "v" else not bad.isfinite().all()
    assert out[0, 1].isfinite().all(), "the other head is not touched"
    if where == "q":
        assert out[0, 0, :200].isfinite().all() and out[0, 0, 201:].isfinite().all(), "nor are other rows"
    if where == "k":
        assert mask.to_bool()[0, 0].all(), "scores that do not compare drop nothing"


def test_int8_through_the_api_and_full_with_lse(device):
    inputs = [x.to(device) for x in oracle.make(1, 2, 300, 300, 64, torch.float16)]
    full = lite_attention(*inputs, backend="triton")
    int8 = lite_attention(*inputs, backend="triton", precision="int8")
    assert not torch.equal(full, int8) and (full - int8).abs().max() < 0.1
    again, _ = lite_attention(*inputs, backend="triton", precision="int8", return_lse=True)
    assert torch.equal(again, lite_attention(*inputs, backend="triton", return_lse=True)[0])
    assert torch.equal(lite_attention(*inputs, backend="triton", precision="auto"), full), "short: auto is full"


@pytest.mark.parametrize("arch, dtype, requested, name, says", [
    ("sm_89", torch.bfloat16, "auto", "int8", ""), ("sm_86", torch.float16, "auto", "int8", ""),
    ("sm_120", torch.bfloat16, "auto", "int8", ""), ("sm_90", torch.bfloat16, "auto", "full", ""),
    ("sm_80", torch.bfloat16, "auto", "full", ""), ("sm_89", torch.float32, "auto", "full", ""),
    ("sm_89", torch.bfloat16, "full", "full", ""), ("sm_90", torch.bfloat16, "int8", "int8", ""),
    ("sm_80", torch.float16, "int8", "int8", ""), ("sm_100", torch.bfloat16, "int8", "full", "slower in INT8"),
    ("gfx1100", torch.float16, "int8", "full", "NVIDIA"), ("sm_89", torch.float32, "int8", "full", "float32"),
])
def test_choice(monkeypatch, arch, dtype, requested, name, says):
    from liteattention.kernels import precision

    monkeypatch.setattr(precision, "architecture", lambda device: arch)
    choice = precision_choice(torch.device("cuda"), 128, dtype, AUTO_INT8_MIN_TOKENS, requested)
    assert choice.name == name and says in choice.reason and bool(choice.reason) == bool(says)
    assert precision_choice(torch.device("cuda"), 128, dtype, AUTO_INT8_MIN_TOKENS - 1, "auto").name == "full"


def test_torch_computes_in_full_precision_and_says_so():
    choice = precision_choice(torch.device("cpu"), 64, torch.float16, 99999, "int8", "torch")
    assert choice.name == "full" and "torch backend" in choice.reason
    with pytest.raises(ValueError, match=r"precision is 'fp8'; allowed: auto, full, int8"):
        precision_choice(torch.device("cpu"), 64, torch.float16, 1, "fp8")
    with pytest.raises(ValueError, match=r"precision is 'fp8'"):
        lite_attention(*oracle.make(1, 1, 100, 100, 64, torch.float32), precision="fp8")
