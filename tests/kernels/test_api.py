"""What is refused, with which words, and that nothing was touched; which backend is chosen."""

import math
import os
import subprocess
import sys

import pytest
import torch

from liteattention.kernels import SkipMask, UnsupportedAttention, choose_backend, lite_attention, resolve_backend
from liteattention.kernels import unsupported_call as unsupported


def qkv(shape=(1, 2, 300, 64), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def changed(index, tensor):
    inputs = qkv()
    inputs[index] = tensor
    return inputs


BAD = [
    (changed(0, torch.randn(1, 2, 300, 64).double()), {}, "q.dtype", "dtype torch.float64 not supported"),
    (qkv(dtype=torch.int8), {}, "q.dtype", "dtype torch.int8 not supported"),
    (changed(1, torch.randn(1, 2, 300, 64).half()), {}, "k.dtype", "q, k, v differ in dtype"),
    (changed(2, torch.empty(1, 2, 300, 64, device="meta")), {}, "v.device", "q, k, v on different devices"),
    (qkv((2, 300, 64)), {}, "q.shape", "layout not supported"),
    (qkv(), {"heads": 2}, "q.shape", "layout not supported"),
    (qkv((1, 300, 130)), {"heads": 4}, "heads", "layout not supported"),
    (changed(0, torch.randn(1, 2, 300, 128)[..., ::2]), {}, "q.stride(-1)", "last stride is not 1"),
    (changed(2, torch.randn(1, 2, 299, 64)), {}, "v.shape", "k and v differ in shape"),
    ([torch.randn(2, 2, 300, 64), *qkv()[1:]], {}, "k.shape[0]", "q and k differ in batch"),
    ([torch.randn(1, 4, 300, 64), *qkv()[1:]], {}, "k.shape", "grouped-query attention"),
    (qkv((1, 2, 300, 80)), {}, "head_dim", "head_dim 80 not supported"),
    (qkv((1, 2, 0, 64)), {}, "q.shape", "empty call"),
    (qkv((0, 2, 300, 64)), {}, "q.shape", "empty call"),
    (qkv(), {"attn_mask": torch.zeros(300, 300)}, "attn_mask", "attention mask given"),
    (qkv(), {"sm_scale": -1.0}, "sm_scale", "softmax scale not positive"),
    (qkv(), {"sm_scale": math.nan}, "sm_scale", "softmax scale not positive"),
]


@pytest.mark.parametrize("inputs, options, argument, reason", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_calls_that_cannot_be_served(inputs, options, argument, reason):
    mask = SkipMask.full(1, 2, 300)
    before = mask.words.clone()
    with pytest.raises(UnsupportedAttention, match="allowed: ") as caught:
        lite_attention(*inputs, mask, threshold=-4.0, **options)
    assert caught.value.argument == argument and caught.value.reason == reason
    assert str(caught.value.value) in str(caught.value)
    assert torch.equal(mask.words, before) and mask.passes == [0], "nothing was written"
    assert unsupported(*inputs, **options).reason == reason


@pytest.mark.parametrize("make, argument, reason", [
    (lambda: SkipMask.full(2, 2, 300), "mask", "mask for another shape"),
    (lambda: SkipMask.full(1, 3, 300), "mask", "mask for another shape"),
    (lambda: SkipMask.full(1, 2, 301), "mask", "mask for another shape"),
    (lambda: SkipMask.full(1, 2, 300, 500), "mask", "mask for another shape"),
    (lambda: SkipMask.full(1, 2, 300, device="meta"), "mask.device", "mask on another device"),
    (lambda: [], "mask", "mask for another shape"),
])
def test_masks_that_do_not_fit(make, argument, reason):
    with pytest.raises(UnsupportedAttention) as caught:
        lite_attention(*qkv(), make(), threshold=-4.0)
    assert caught.value.argument == argument and caught.value.reason == reason


def test_one_mask_row_cannot_serve_two_batch_rows():
    mask = SkipMask.full(1, 2, 300)
    with pytest.raises(UnsupportedAttention, match="several batch rows"):
        lite_attention(*qkv((2, 2, 300, 64)), [mask, mask], threshold=-4.0)


@pytest.mark.parametrize("threshold", [math.nan, 0.5, math.inf])
def test_impossible_thresholds(threshold):
    with pytest.raises(ValueError, match="threshold is"):
        lite_attention(*qkv(), SkipMask.full(1, 2, 300), threshold=threshold)


CPU = torch.device("cpu")


def test_an_unknown_backend_names_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: auto, triton, torch"):
        choose_backend(CPU, "cuda")
    monkeypatch.setenv("LITEATTENTION_BACKEND", "fast")
    with pytest.raises(ValueError, match="environment variable LITEATTENTION_BACKEND is 'fast'"):
        choose_backend(CPU)


def test_the_argument_beats_the_environment(monkeypatch):
    assert resolve_backend(CPU).name == "torch" and not resolve_backend(CPU).asked
    monkeypatch.setenv("LITEATTENTION_BACKEND", "torch")
    assert resolve_backend(CPU).asked
    monkeypatch.setenv("LITEATTENTION_BACKEND", "triton")
    assert choose_backend(CPU, "torch") == "torch"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run on cpu"):
        lite_attention(*qkv(), backend="triton")


def test_without_triton_a_gpu_gets_torch_and_the_reason(monkeypatch):
    from liteattention.kernels import backends
    from liteattention.kernels.triton_probe import TritonVerdict

    monkeypatch.setattr(backends, "triton_verdict", lambda device: TritonVerdict(False, "no Triton here"))
    choice = resolve_backend(torch.device("cuda"))
    assert (choice.name, choice.asked, choice.reason) == ("torch", False, "no Triton here")


def test_a_python_without_triton_runs_the_torch_backend():
    code = ("import sys; sys.modules['triton'] = None; sys.path.insert(0, sys.argv[1])\n"
            "from load_pack import load_pack; load_pack()\n"
            "import torch; from liteattention.kernels import lite_attention\n"
            "q = torch.randn(1, 1, 200, 64); assert torch.isfinite(lite_attention(q, q, q)).all()")
    from load_pack import ROOT

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "tools")], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
