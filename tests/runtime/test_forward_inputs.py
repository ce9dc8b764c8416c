"""Odd calls in a run: each is as right as dense attention or stays dense, and the calls after it are as ever."""

import pytest
import torch
from run_kit import HEADS, D, N, dense, sampling_run

from liteattention.runtime import AttentionCall, LayerId, Threshold

LAYER = LayerId("double", 0, 1)


def make(batch=1, n=N, heads=HEADS, d=D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, heads * d, generator=generator).to(dtype) for _ in range(3)]


def repeat(inputs, steps=3, rows=None, total=4, heads=HEADS, fallback=lambda: "dense", **settings):
    """The outputs of some steps with the same inputs, and the summary."""
    run, outs = sampling_run(total, **{"min_tokens": 1, "warmup_steps": 0, **settings}), []
    for step in range(steps):
        names = rows if rows is not None else [("row", i) for i in range(inputs[0].shape[0])]
        forward_pass = run.forward_pass(model="m", rows=names, video_tokens=inputs[0].shape[-2])
        outs.append(forward_pass.attend(AttentionCall.from_hook(*inputs, heads), LAYER, fallback))
        run.end_step(step)
    return outs, run.close()


def exact(q, k, v, heads=HEADS):
    split = [x.double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


CAREFUL = {"rule": Threshold(-30.0)}


@pytest.mark.parametrize("threshold", [0.0, -4.0, -30.0])
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 300])
def test_any_number_of_tokens(n, threshold):
    """At -30 nothing that matters goes; at 0 a single tile always stays."""
    inputs = make(n=n)
    outs, summary = repeat(inputs, rule=Threshold(threshold))
    assert summary.sparse_calls == 3 and not summary.notes
    for out in outs[:1 if threshold > -30 and n > 128 else 3]:
        assert (out - exact(*inputs)).abs().max() < 1e-5
    assert all(torch.isfinite(out).all() and out.shape == inputs[0].shape for out in outs)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_served_dtypes(dtype, bound):
    inputs = make(dtype=dtype)
    outs, summary = repeat(inputs, **CAREFUL)
    assert summary.sparse_calls == 3 and all(out.dtype == dtype for out in outs)
    assert all((out.double() - exact(*inputs)).abs().max() < bound for out in outs)


def test_inputs_that_were_cast_from_fp8():
    """Models with fp8 weights give activations in 16 bits; values of few bits make ties between tiles."""
    inputs = [x.to(torch.float8_e4m3fn).to(torch.bfloat16) for x in make()]
    outs, summary = repeat(inputs, **CAREFUL)
    assert summary.sparse_calls == 3 and all((out.double() - exact(*inputs)).abs().max() < 2e-2 for out in outs)


DENSE = {
    "fp8": ([x.to(torch.float8_e4m3fn) for x in make()], "dtype torch.float8_e4m3fn not supported"),
    "float64": ([x.double() for x in make()], "dtype torch.float64 not supported"),
    "mixed": ([x.to(t) for x, t in zip(make(), (torch.float16, torch.float32, torch.float16), strict=True)],
              "q, k, v differ in dtype"),
    "batch 0": (make(batch=0), "empty call"),
    "no tokens": (make(n=0), "empty call"),
    "no text": ([*make()[:1], *make(n=0)[1:]], "cross-attention"),
    "text of one token": ([*make()[:1], *make(n=1)[1:]], "cross-attention"),
    "head size 63": (make(d=63), "head_dim 63 not supported"),
    "columns first": ([x.mT.contiguous().mT for x in make()], "last stride is not 1"),
    "k and v differ": ([*make()[:2], make(heads=1)[2]], "k and v differ in shape"),
    "wants gradients": ([x.requires_grad_() for x in make()], "gradients wanted"),
    "meta": ([x.to("meta") for x in make()], "no fast backend on this device"),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_cannot_be_served_stays_dense_and_changes_nothing(name):
    inputs, text = DENSE[name]
    good = make(n=N)
    alone, _ = repeat(good)
    run = sampling_run(4, min_tokens=1, warmup_steps=0)
    outs = []
    for step in range(3):
        with torch.enable_grad():
            rows = [("odd", i) for i in range(inputs[0].shape[0])]
            forward_pass = run.forward_pass(model="m", rows=rows, video_tokens=N)
            call = AttentionCall.from_hook(*inputs, HEADS)
            assert forward_pass.attend(call, LAYER, lambda: "dense") == "dense"
        forward_pass = run.forward_pass(model="m", rows=[("row", 0)], video_tokens=N)
        outs.append(forward_pass.attend(AttentionCall.from_hook(*good, HEADS), LAYER, lambda: "dense"))
        run.end_step(step)
    assert all(map(torch.equal, outs, alone))
    summary = run.close()
    assert summary.sparse_calls == 3 and {str(r): n for r, n in summary.dense_calls.items()} == {text: 3}


STRIDES = {
    "every second row": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "a slice of a wider projection": lambda x: torch.cat([x, x, x], 2)[..., x.shape[2]:2 * x.shape[2]],
    "tokens before the batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "an offset of one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one row for the whole batch": lambda x: x[:1].expand_as(x),
    "one token for all": lambda x: x[:, :1].expand_as(x),
    "windows that overlap": lambda x: x.flatten().as_strided(x.shape, (x.shape[2], x.shape[2] // 2, 1)),
}


@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind):
    """Bit for bit what a contiguous copy gives, also where elements are shared; the inputs are only read."""
    inputs = [STRIDES[kind](x) for x in make(batch=2)]
    copies = [x.contiguous().clone() for x in inputs]
    outs, summary = repeat(inputs)
    expected, _ = repeat(copies)
    assert summary.sparse_calls == 3 and all(map(torch.equal, outs, expected))
    assert all(map(torch.equal, inputs, copies))
    assert torch.isfinite(torch.stack(outs)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "all"])
def test_nan_and_inf(where, value):
    """Where dense attention gives a number, so does this run; nothing hangs, and a row next to it is untouched."""
    inputs = make(batch=2)
    for name, x in zip("qkv", inputs, strict=True):
        if where in (name, "all"):
            x[0, 200, 3] = value
    outs, summary = repeat(inputs, **CAREFUL)
    expected = dense(*inputs)
    assert summary.sparse_calls == 3
    finite = torch.isfinite(expected)
    clean, _ = repeat([x[1:] for x in inputs], rows=[("row", 1)], **CAREFUL)
    for out, alone in zip(outs, clean, strict=True):
        assert torch.allclose(out[finite], expected[finite], atol=1e-4)
        assert not torch.isfinite(out[~finite]).any(), "what dense attention shows is not hidden"
        assert torch.equal(out[1:], alone)


SETTINGS = [{}, {"warmup_steps": 100}, {"warmup_steps": 100, "dense_end_steps": 100}, {"warmup_steps": 0}]


@pytest.mark.parametrize("total, steps, settings", [
    *[(*run, settings) for run in ((1, 1), (1, 3), (2, 2)) for settings in SETTINGS],
    (1000, 1000, {"warmup_steps": 100})], ids=str)
def test_numbers_of_steps(total, steps, settings):
    """More steps than planned, too; a warm-up longer than the run leaves something of it."""
    inputs = make(n=130, heads=1)
    outs, summary = repeat(inputs, steps, total=total, heads=1, **{"warmup_steps": 2, **settings},
                           fallback=lambda: exact(*inputs, 1).float())
    assert all(torch.isfinite(out).all() for out in outs) and summary.steps_done == steps
    assert summary.sparse_calls + sum(summary.dense_calls.values()) == steps and not summary.notes
    if settings.get("dense_end_steps", 0) >= total:
        assert summary.sparse_calls == 0
    elif total == 1000:
        assert summary.sparse_calls >= 0.7 * steps
    if (total, steps) == (1, 1):
        assert (outs[0] - exact(*inputs, 1)).abs().max() < 1e-5, "the only step is dense"
