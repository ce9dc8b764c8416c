"""What the docstring of `lite_attention` promises beyond the rule itself."""

import math

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention

F16 = torch.float16


def setup(backend, device, n=400, d=64, batch=1, heads=2, seed=0):
    place = device if backend == "triton" else torch.device("cpu")
    return [x.to(place) for x in oracle.make(batch, heads, n, n, d, F16, seed=seed)], place


@pytest.mark.parametrize("n", [384, 400])
def test_minus_infinity_is_the_dense_run_bit_for_bit(backend, device, n):
    inputs, place = setup(backend, device, n)
    mask = SkipMask.full(1, 2, n, device=place)
    dense = lite_attention(*inputs, backend=backend)
    for _ in range(2):
        assert torch.equal(lite_attention(*inputs, mask, threshold=-math.inf, backend=backend), dense)
    assert mask.density() == 1 and mask.passes == [0]


@pytest.mark.parametrize("n", [384, 400])
def test_recording_itself_changes_no_bit_of_the_result(backend, device, n):
    inputs, place = setup(backend, device, n)
    mask = SkipMask.full(1, 2, n, device=place)
    recorded = lite_attention(*inputs, mask, threshold=-1e30, backend=backend)
    assert torch.equal(recorded, lite_attention(*inputs, backend=backend))
    assert mask.density() == 1 and mask.passes == [1]


def test_reading_leaves_the_mask_and_uses_it(backend, device):
    inputs, place = setup(backend, device)
    bits = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    mask = SkipMask.from_bool(bits, 400, 400).to(place)
    words = mask.words.clone()
    out = lite_attention(*inputs, mask, threshold=-4.0, record=False, backend=backend)
    expected = oracle.attention(*(x.cpu() for x in inputs), bits, -4.0)
    assert (out.double().cpu() - expected.out).abs().max() < 5e-3
    assert torch.equal(mask.words, words) and mask.passes == [0]


def test_a_query_tile_without_tiles_gives_zero(backend, device):
    inputs, place = setup(backend, device)
    bits = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    bits[0, 1, 2] = False
    mask = SkipMask.from_bool(bits, 400, 400).to(place)
    out, lse = lite_attention(*inputs, mask, threshold=-4.0, backend=backend, return_lse=True)
    assert (out[0, 1, 256:384] == 0).all() and (lse[0, 1, 256:384] == -math.inf).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[0, 0]).all()
    assert not mask.to_bool()[0, 1, 2].any()


def test_two_runs_are_bitwise_equal(backend, device):
    inputs, place = setup(backend, device)
    runs = []
    for _ in range(2):
        mask = SkipMask.full(1, 2, 400, device=place)
        outs = [lite_attention(*inputs, mask, threshold=-4.0, backend=backend) for _ in range(2)]
        runs.append((*outs, mask.words))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("where, value", [("q", math.nan), ("q", math.inf), ("k", math.nan), ("k", math.inf),
                                          ("k", -math.inf), ("v", math.nan), ("v", math.inf)])
def test_nan_and_inf_come_out_as_in_dense_attention_and_clear_nothing(backend, device, where, value):
    """Row 5 of head 0 and its neighbours: the same elements are not finite, and the row keeps what it still meets."""
    inputs, place = setup(backend, device)
    token, channel = 5, 3
    dict(zip("qkv", inputs, strict=True))[where][0, 0, token, channel] = value
    clean, _ = setup(backend, device)
    masks = [SkipMask.full(1, 2, 400, device=place) for _ in range(2)]
    out = lite_attention(*inputs, masks[0], threshold=-4.0, backend=backend).float().cpu()
    lite_attention(*clean, masks[1], threshold=-4.0, backend=backend)
    dense = torch.softmax((inputs[0].cpu().double() @ inputs[1].cpu().double().transpose(-1, -2)) / 8, -1)
    dense = dense @ inputs[2].cpu().double()
    assert torch.equal(out.isnan(), dense.isnan())
    assert torch.equal(out.isinf(), dense.isinf())
    fine = dense.isfinite()
    assert (out.double() - dense)[fine].abs().max() < 5e-3
    bits, without = (m.to_bool().cpu() for m in masks)
    assert torch.equal(bits[0, 1], without[0, 1]), "the other head does not notice"
    if where == "q":
        assert bits[0, 0, 0].all(), "the row cannot judge, so it keeps every tile"
        assert torch.equal(bits[0, 0, 1:], without[0, 0, 1:])
    if where == "v":
        assert torch.equal(bits, without), "values do not enter decisions"
    assert without.float().mean() < 1


def test_a_tile_of_minus_infinity_scores_weighs_nothing(backend, device):
    """Keys that overflow to -inf against every query: weight 0, and no NaN even where the row meets them first."""
    inputs, place = setup(backend, device, d=128)
    q, k, v = (x.float() for x in inputs)
    q[..., 0], k[:, :, 0:128, 0] = 1e20, -1e30
    out = lite_attention(q, k, v, SkipMask.full(1, 2, 400, device=place), threshold=-1e30, backend=backend).cpu()
    q, k, v = (x.cpu() for x in (q, k, v))
    assert ((q @ k.transpose(-1, -2))[..., :128] == -math.inf).all()
    expected = torch.softmax((q[..., 1:].double() @ k[..., 1:].double().transpose(-1, -2)
                              + q[..., :1].double() * k[..., :1].double().transpose(-1, -2)) / 128 ** 0.5, -1)
    assert torch.isfinite(out).all()
    assert (expected[..., :128] == 0).all()
    assert (out - expected @ v.double()).abs().max() < 1e-3


def test_counting_and_workspace(backend, device):
    inputs, place = setup(backend, device)
    mask = SkipMask.full(1, 2, 400, device=place)
    workspace, computed = Workspace(), torch.zeros(1, dtype=torch.int64, device=place)
    sizes, active = [], 0
    keep = MustKeep(keys=((0, 10),))
    for _ in range(4):
        active += mask.active_tiles().item()
        lite_attention(*inputs, mask, threshold=-4.0, must_keep=keep, backend=backend, workspace=workspace,
                       computed=computed)
        assert computed.item() == active
        sizes.append((workspace.nbytes, {k: b.data_ptr() for k, b in workspace._buffers.items()}))
    # Two directions make two row tables; from then on nothing is allocated.
    assert sizes[1] == sizes[2] == sizes[3]
    workspace.close()
    assert workspace.nbytes == 0


def test_the_torch_backend_multiplies_in_proportion_to_density(monkeypatch):
    inputs, _ = setup("torch", None, n=1280)
    counted = []
    bmm, baddbmm = torch.bmm, torch.Tensor.baddbmm_
    monkeypatch.setattr(torch, "bmm", lambda a, b: counted.append(b.shape[-1]) or bmm(a, b))
    monkeypatch.setattr(torch.Tensor, "baddbmm_",
                        lambda self, a, b: counted.append(b.shape[-2]) or baddbmm(self, a, b))
    work = {}
    for density in (1.0, 0.5, 0.1):
        bits = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(0)) < density
        mask = SkipMask.from_bool(bits, 1280, 1280)
        counted.clear()
        lite_attention(*inputs, mask, threshold=-4.0, backend="torch")
        work[density] = sum(counted), bits.sum().item()
    for keys, active in work.values():
        assert keys == 2 * 128 * active, "QK and PV each see every active tile's 128 keys once, and no other"


def test_a_failed_launch_resets_the_masks_it_had_opened(device, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    from liteattention.kernels import triton_attention

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("launch failed")

    inputs, place = setup("triton", device)
    mask = SkipMask.full(1, 2, 400, device=place)
    lite_attention(*inputs, mask, threshold=-4.0, backend="triton")
    assert mask.density() < 1
    monkeypatch.setattr(triton_attention, "attention_kernel", Broken())
    with pytest.raises(RuntimeError, match="launch failed"):
        lite_attention(*inputs, mask, threshold=-4.0, backend="triton")
    assert mask.density() == 1 and mask.passes == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_masks_do_not_depend_on_the_compute_tile(device, dtype):
    """BLOCK_M, BLOCK_N and the recording form change the launch, not one decision."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    from liteattention.kernels.launch import LaunchConfig
    from liteattention.kernels.triton_attention import triton_attention

    inputs = [x.to(device) for x in oracle.make(1, 1, 300, 300, 64, dtype)]
    found = []
    for block_m, block_n, record in ((128, 128, 1), (128, 64, 3), (128, 32, 1), (64, 64, 3), (64, 128, 3)):
        mask = SkipMask.full(1, 1, 300, device=device)
        out = torch.empty_like(inputs[0])
        triton_attention(*inputs, out, None, [(mask, 0)], [False], -3.0, True, None, 0.125, Workspace(), None,
                         LaunchConfig(block_m, block_n, 8, 2, record))
        found.append((out, mask.words))
    assert SkipMask(found[0][1], 300, 300).density() < 1
    for out, words in found[1:]:
        assert torch.equal(words, found[0][1])
        assert (out - found[0][0]).abs().max() < 2e-3


def test_offsets_beyond_two_to_the_31_elements(backend, device):
    """A token stride of 2^23 elements puts whole key tiles beyond 2^31. Only the touched pages are ever committed."""
    n, stride = 400, 2**23
    if device.type == "cuda" and backend == "triton" and torch.cuda.mem_get_info()[0] < 2 * n * stride * 1.2:
        pytest.skip("needs 8 GB of GPU memory")
    place = device if backend == "triton" else torch.device("cpu")
    small = [x.to(place) for x in oracle.make(1, 1, n, n, 64, F16)]
    memory = torch.empty(n * stride, dtype=F16, device=place)
    far = []
    for i, x in enumerate(small):
        view = memory.as_strided((1, 1, n, 64), (n * stride, 64, stride, 1), i * 64)
        view.copy_(x)
        far.append(view)
    masks = [SkipMask.full(1, 1, n, device=place) for _ in range(2)]
    near_out, far_out = (lite_attention(*x, m, threshold=-4.0, backend=backend)
                         for x, m in zip((small, far), masks, strict=True))
    assert torch.equal(near_out, far_out) and torch.equal(masks[0].words, masks[1].words)
    assert masks[0].density() < 1
