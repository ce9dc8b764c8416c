"""What is refused, with which words, and that nothing was touched; which backend is chosen."""

import math
import os
import subprocess
import sys

import pytest
import torch

from liteattention.kernels import (
    MustKeep,
    SkipMask,
    UnsupportedAttention,
    choose_backend,
    lite_attention,
    resolve_backend,
)
from liteattention.kernels import unsupported_call as unsupported


def qkv(shape=(1, 2, 300, 64), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def changed(index, tensor):
    inputs = qkv()
    inputs[index] = tensor
    return inputs


def with_strides(step):
    return changed(1, torch.randn(1, 2, 300, 64 * step)[..., ::step])


FLOATS, LAYOUTS = "float16, bfloat16, float32", "[B, H, N, D], or [B, N, H*D] with heads=H"
# inputs, options, argument, its value, what is allowed, reason
BAD = [
    (changed(0, torch.randn(1, 2, 300, 64).double()), {}, "q.dtype", "torch.float64", FLOATS,
     "dtype torch.float64 not supported"),
    (qkv(dtype=torch.int8), {}, "q.dtype", "torch.int8", FLOATS, "dtype torch.int8 not supported"),
    (changed(2, torch.randn(1, 2, 300, 64).to(torch.float8_e4m3fn)), {}, "v.dtype", "torch.float8_e4m3fn", FLOATS,
     "dtype torch.float8_e4m3fn not supported"),
    (changed(1, torch.randn(1, 2, 300, 64).half()), {}, "k.dtype", "torch.float16", "the dtype of q, torch.float32",
     "q, k, v differ in dtype"),
    (changed(2, torch.empty(1, 2, 300, 64, device="meta")), {}, "v.device", "meta", "the device of q, cpu",
     "q, k, v on different devices"),
    (qkv((2, 300, 64)), {}, "q.shape", "[2, 300, 64]", LAYOUTS, "layout not supported"),
    (changed(1, torch.randn(2, 300, 64)), {}, "k.shape", "[2, 300, 64]", LAYOUTS, "layout not supported"),
    (qkv(), {"heads": 2}, "q.shape", "[1, 2, 300, 64]", LAYOUTS, "layout not supported"),
    (qkv((1, 300, 130)), {"heads": 4}, "heads", "4", "a divisor of q.shape[-1] = 130", "layout not supported"),
    (qkv((1, 300, 128)), {"heads": 0}, "heads", "0", "a divisor of q.shape[-1] = 128", "layout not supported"),
    (with_strides(2), {}, "k.stride(-1)", "2", "1", "last stride is not 1"),
    (changed(2, torch.randn(1, 2, 299, 64)), {}, "v.shape", "[1, 2, 299, 64]", "the shape of k, [1, 2, 300, 64]",
     "k and v differ in shape"),
    ([torch.randn(2, 2, 300, 64), *qkv()[1:]], {}, "k.shape[0]", "1", "the batch of q, 2", "q and k differ in batch"),
    ([torch.randn(1, 4, 300, 64), *qkv()[1:]], {}, "k.shape", "[1, 2, 300, 64]",
     "the heads and head_dim of q, [1, 4, 300, 64] (no grouped queries)", "grouped-query attention"),
    ([torch.randn(1, 2, 300, 128), *qkv()[1:]], {}, "k.shape", "[1, 2, 300, 64]",
     "the heads and head_dim of q, [1, 2, 300, 128] (no grouped queries)", "grouped-query attention"),
    (qkv((1, 2, 300, 80)), {}, "head_dim", "80", "64, 96, 128", "head_dim 80 not supported"),
    (qkv((1, 300, 160)), {"heads": 2}, "head_dim", "80", "64, 96, 128", "head_dim 80 not supported"),
    (qkv((1, 2, 0, 64)), {}, "q.shape", "[1, 2, 0, 64]", "at least one batch row, head, query and key", "empty call"),
    (qkv((0, 2, 300, 64)), {}, "q.shape", "[0, 2, 300, 64]", "at least one batch row, head, query and key",
     "empty call"),
    ([*qkv()[:1], *qkv((1, 2, 0, 64))[:2]], {}, "q.shape", "[1, 2, 300, 64]",
     "at least one batch row, head, query and key", "empty call"),
    (qkv(), {"attn_mask": torch.zeros(300, 300)}, "attn_mask", "a [300, 300] tensor", "None", "attention mask given"),
    *((qkv(), {"sm_scale": x}, "sm_scale", str(x), "a finite number above 0", "softmax scale not positive")
      for x in (-1.0, 0.0, math.nan, math.inf)),
]


def ids(x):
    return x if isinstance(x, str) and " " not in x else ""


@pytest.mark.parametrize("inputs, options, argument, value, allowed, reason", BAD, ids=ids)
def test_calls_that_cannot_be_served(inputs, options, argument, value, allowed, reason):
    """The error names the argument, its value and what is allowed; no mask and no counter has changed."""
    mask, computed = SkipMask.full(1, 2, 300), torch.zeros(1, dtype=torch.int64)
    before = mask.words.clone()
    with pytest.raises(UnsupportedAttention) as caught:
        lite_attention(*inputs, mask, threshold=-4.0, computed=computed, **options)
    error = caught.value
    assert (error.argument, str(error.value), error.allowed, error.reason) == (argument, value, allowed, reason)
    assert str(error) == f"{argument} is {value}; allowed: {allowed}"
    assert torch.equal(mask.words, before) and mask.passes == [0] and computed.item() == 0, "nothing was written"
    assert unsupported(*inputs, **options).reason == reason


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_calls_that_can_be_served(d, dtype):
    """Also without data, on another device, with one key, and where a dimension of size 1 has an odd stride."""
    assert unsupported(*qkv((2, 3, 300, d), dtype)) is None
    assert unsupported(*qkv((2, 300, 3 * d), dtype), heads=3, sm_scale=1e-3) is None
    far = [torch.empty(1, 40, n, d, dtype=dtype, device="meta") for n in (4_000_000, 1, 1)]
    assert unsupported(*far) is None


def moved(mask):
    mask.passes = [3] * mask.batch
    return mask


@pytest.mark.parametrize("make, argument, value, reason", [
    (lambda: SkipMask.full(2, 2, 300), "mask", "2 rows", "mask for another shape"),
    (lambda: SkipMask.full(1, 3, 300), "mask", "3 heads, 300 x 300 tokens", "mask for another shape"),
    (lambda: SkipMask.full(1, 2, 301), "mask", "2 heads, 301 x 301 tokens", "mask for another shape"),
    (lambda: SkipMask.full(1, 2, 300, 500), "mask", "2 heads, 300 x 500 tokens", "mask for another shape"),
    (lambda: SkipMask.full(1, 2, 300, device="meta"), "mask.device", "meta", "mask on another device"),
    (lambda: [], "mask", "0 rows", "mask for another shape"),
    (lambda: [SkipMask.full(1, 2, 300), SkipMask.full(1, 2, 300)], "mask", "2 rows", "mask for another shape"),
])
def test_masks_that_do_not_fit(make, argument, value, reason):
    masks = make()
    held = [masks] if isinstance(masks, SkipMask) else masks
    for mask in held:
        moved(mask)
    with pytest.raises(UnsupportedAttention, match="allowed: ") as caught:
        lite_attention(*qkv(), masks, threshold=-4.0)
    assert (caught.value.argument, str(caught.value.value), caught.value.reason) == (argument, value, reason)
    for mask in held:
        assert mask.passes == [3] * mask.batch
        assert mask.device.type == "meta" or mask.density() == 1


def test_one_mask_row_cannot_serve_two_batch_rows():
    mask = SkipMask.full(1, 2, 300)
    with pytest.raises(UnsupportedAttention, match="several batch rows"):
        lite_attention(*qkv((2, 2, 300, 64)), [mask, mask], threshold=-4.0)
    assert mask.density() == 1 and mask.passes == [0]


def test_calls_that_want_gradients_are_refused_and_others_of_the_same_tensors_are_not():
    q, k, v = qkv()
    v.requires_grad_()
    with pytest.raises(UnsupportedAttention, match="v.requires_grad is True") as caught:
        lite_attention(q, k, v)
    assert caught.value.reason == "gradients wanted"
    with torch.no_grad():
        assert lite_attention(q, k, v).isfinite().all()


@pytest.mark.parametrize("threshold", [math.nan, 0.5, math.inf])
def test_impossible_thresholds(threshold):
    mask = SkipMask.full(1, 2, 300)
    with pytest.raises(ValueError, match="threshold is .*; it is a log2 value from -inf to 0"):
        lite_attention(*qkv(), mask, threshold=threshold)
    assert mask.density() == 1 and mask.passes == [0]


@pytest.mark.parametrize("options", [{}, {"record": False}, {"threshold": -math.inf}], ids=str)
@pytest.mark.parametrize("with_mask", [True, False])
def test_impossible_must_keep_ranges_are_told_before_anything_is_computed(backend, place, options, with_mask):
    """Also where this call would not have used them: the next one might."""
    mask = SkipMask.full(1, 2, 300, device=place) if with_mask else None
    computed = torch.zeros(1, dtype=torch.int64, device=place)
    with pytest.raises(ValueError, match=r"must_keep.keys holds \(0, 301\); a range needs 0 <= start < stop <= 300"):
        lite_attention(*(x.to(place) for x in qkv()), mask, must_keep=MustKeep(keys=((0, 301),)), backend=backend,
                       computed=computed, **{"threshold": -4.0, **options})
    assert computed.item() == 0
    assert mask is None or (mask.density() == 1 and mask.passes == [0])


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
    from liteattention.kernels import backend
    from liteattention.kernels.triton_probe import TritonVerdict

    monkeypatch.setattr(backend, "triton_verdict", lambda device: TritonVerdict(False, "no Triton here"))
    choice = resolve_backend(torch.device("cuda"))
    assert (choice.name, choice.asked, choice.reason) == ("torch", False, "no Triton here")


@pytest.mark.parametrize("by_argument", [True, False])
def test_the_named_backend_is_the_one_that_runs(monkeypatch, device, by_argument):
    """Argument and environment reach the call itself; a failure there is not covered up by the other backend."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    from liteattention.kernels import torch_attention, triton_launch

    def fail(*args, **options):
        raise RuntimeError("no launch today")

    name = {} if by_argument else {"backend": None}
    inputs = [x.to(device) for x in qkv()]
    for chosen, module in (("triton", triton_launch), ("torch", torch_attention)):
        with monkeypatch.context() as patch:
            if by_argument:
                name = {"backend": chosen}
            else:
                patch.setenv("LITEATTENTION_BACKEND", chosen)
            patch.setattr(module, f"{chosen}_attention", fail)
            with pytest.raises(RuntimeError, match="no launch today"):
                lite_attention(*inputs, **name)


def fresh(code, **environment):
    """Runs `code` with the pack loaded as `liteattention`, in a new process without our environment variables."""
    from load_pack import ROOT

    start = "import sys; sys.path.insert(0, sys.argv[1])\nfrom load_pack import load_pack; load_pack()\n"
    ours = ("TRITON_INTERPRET", "LITEATTENTION_BACKEND", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run([sys.executable, "-c", start + code, str(ROOT / "tools")], capture_output=True, text=True,
                          env={**kept, **environment})
    assert done.returncode == 0, done.stderr


def test_a_fresh_process_has_no_triton_on_its_cpu():
    """Without the interpreter "triton" is an error there, named either way, and "auto" never asks for it."""
    fresh("""
import os, torch
from liteattention.kernels import lite_attention
q = torch.randn(1, 1, 200, 64)
assert torch.isfinite(lite_attention(q, q, q)).all() and "triton" not in sys.modules
for options in ({"backend": "triton"}, {}):
    os.environ["LITEATTENTION_BACKEND"] = "torch" if options else "triton"
    try:
        lite_attention(q, q, q, **options)
    except ValueError as error:
        assert "cannot run on cpu" in str(error) and "TRITON_INTERPRET=1" in str(error), error
    else:
        raise SystemExit("it ran")
""")


def test_a_python_without_triton_and_comfyui_runs_the_torch_backend():
    fresh("""
for name in ("triton", "comfy", "comfy_api"):
    sys.modules[name] = None
import math, torch
from liteattention.kernels import SkipMask, lite_attention
q = torch.randn(1, 2, 300, 64)
mask = SkipMask.full(1, 2, 300)
out = lite_attention(q, q, q, mask, threshold=-1e30)
assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
assert mask.passes == [1]
""", TRITON_INTERPRET="1")
