"""What the docstring of `lite_attention` promises beyond the rule itself."""

import math

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention, torch_attention
from liteattention.kernels.torch_tiles import attend_part

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
    mask.passes = [1]
    assert torch.equal(lite_attention(*inputs, mask, threshold=-math.inf, backend=backend), dense)
    assert mask.density() == 1 and mask.passes == [1], "whatever the age of the mask"


@pytest.mark.parametrize("n", [384, 400])
def test_recording_itself_changes_no_bit_of_the_result(backend, device, n):
    inputs, place = setup(backend, device, n)
    mask = SkipMask.full(1, 2, n, device=place)
    recorded = lite_attention(*inputs, mask, threshold=-1e30, backend=backend, return_lse=True)
    dense = lite_attention(*inputs, backend=backend, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(recorded, dense, strict=True))
    assert torch.equal(lite_attention(*inputs, backend=backend), dense[0]), "asking for lse changes nothing either"
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


@pytest.mark.parametrize("token, backwards", [(5, False), (200, True)])
@pytest.mark.parametrize("where, value", [("q", math.nan), ("q", math.inf), ("q", -math.inf), ("k", math.nan),
                                          ("k", math.inf), ("k", -math.inf), ("v", math.nan), ("v", math.inf)])
def test_nan_and_inf_come_out_as_dense_and_clear_nothing(backend, device, where, value, token, backwards):
    """One element of head 0, with holes in the mask.

    Held: the output is NaN, Inf and finite exactly where float64 attention over the computed tiles is; a row that
    has met NaN or +Inf keeps every active tile it visits from there on; all other decisions are as without.
    """
    inputs, place = setup(backend, device, n=600)
    clean = [x.cpu().clone() for x in inputs]
    dict(zip("qkv", inputs, strict=True))[where][0, 0, token, 3] = value
    start = oracle.holes(1, 2, 600, 600, 0.9)
    mask = SkipMask.from_bool(start, 600, 600).to(place)
    mask.passes = [int(backwards)]
    out = lite_attention(*inputs, mask, threshold=-4.0, backend=backend).double().cpu()
    expected = oracle.attention(*(x.cpu() for x in inputs), start, -4.0, backwards)
    without = oracle.attention(*clean, start, -4.0, backwards).keep
    assert torch.equal(out.isnan(), expected.out.isnan()) and torch.equal(out.isinf(), expected.out.isinf())
    fine = expected.out.isfinite()
    assert fine.any() and not fine.all() and (out - expected.out)[fine].abs().max() < 5e-3
    bits = mask.to_bool().cpu()
    assert expected.margin.min() > 2e-3, "choose another seed: a decision is too close to call"
    assert torch.equal(bits, expected.keep)
    assert torch.equal(bits[0, 1], without[0, 1]) and without.sum() < start.sum(), "the other head does not notice"
    own = token // 128
    if where == "q":
        assert torch.equal(bits[0, 0, own], start[0, 0, own]), "the row cannot judge, so it keeps every tile"
        assert not torch.equal(without[0, 0, own], start[0, 0, own])
    if where == "k":
        for tile, row in enumerate(start[0, 0].tolist()):
            visited = oracle.order(row, tile, backwards, 600)
            after = visited[visited.index(own):] if own in visited else []
            assert bits[0, 0, tile, after].all(), "everything visited after the tile stays"
        assert not torch.equal(bits, without)
    if where == "v":
        assert torch.equal(bits, without), "values do not enter decisions"


def test_a_tile_that_is_not_computed_cannot_spoil_anything(backend, device):
    """NaN in K and V of key tile 1, which no query tile of head 0 computes."""
    inputs, place = setup(backend, device)
    inputs[1][0, 0, 128:256] = inputs[2][0, 0, 128:256] = math.nan
    bits = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    bits[0, 0, :, 1] = False
    out = lite_attention(*inputs, SkipMask.from_bool(bits, 400, 400).to(place), threshold=-4.0, backend=backend)
    assert out.isfinite().all()
    assert lite_attention(*inputs, backend=backend)[0, 0].isnan().all(), "dense meets them"


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


def test_keys_of_minus_infinity(backend, device):
    """A whole key tile with -Inf scores: weight 0, no NaN, and no vote against anything but what is below -inf."""
    inputs, place = setup(backend, device, n=600)
    inputs[0][..., 0] = inputs[0][..., 0].abs() + 1
    inputs[1][:, :, 128:256, 0] = -math.inf
    start = oracle.holes(1, 2, 600, 600, 0.9)
    mask = SkipMask.from_bool(start, 600, 600).to(place)
    expected = oracle.attention(*(x.cpu() for x in inputs), start, -4.0)
    out, lse = lite_attention(*inputs, mask, threshold=-4.0, backend=backend, return_lse=True)
    assert expected.out.isfinite().all() and (out.double().cpu() - expected.out).abs().max() < 5e-3
    assert torch.allclose(lse.double().cpu(), expected.lse, atol=2e-5, rtol=2e-5)
    assert expected.margin.min() > 2e-3 and torch.equal(mask.to_bool().cpu(), expected.keep)
    assert not expected.keep[0, 0, 0, 1] and expected.keep[0, 0, 1, 1], "dropped, but not where it comes first"


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
    mm, addmm = torch.mm, torch.Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda a, b, out: counted.append(b.shape[-1]) or mm(a, b, out=out))
    monkeypatch.setattr(torch.Tensor, "addmm_",
                        lambda self, a, b: counted.append(b.shape[-2]) or addmm(self, a, b))
    monkeypatch.setattr(torch_attention, "scripted", lambda device_type: attend_part)
    work = {}
    for density in (1.0, 0.5, 0.1):
        bits = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(0)) < density
        mask = SkipMask.from_bool(bits, 1280, 1280)
        counted.clear()
        lite_attention(*inputs, mask, threshold=-4.0, backend="torch")
        work[density] = sum(counted), bits.sum().item()
    for keys, active in work.values():
        assert keys == 2 * 128 * active, "QK and PV each see every active tile's 128 keys once, and no other"


class Broken:
    __name__ = "broken"

    def __getitem__(self, grid):
        raise RuntimeError("launch failed")


@pytest.mark.parametrize("kernel", ["tile_list_kernel", "attention_kernel"])
def test_a_failed_launch_resets_the_masks_it_had_opened(device, monkeypatch, kernel):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    from liteattention.kernels import triton_launch

    inputs, place = setup("triton", device, batch=2, heads=1)
    masks = [SkipMask.full(1, 1, 400, device=place) for _ in range(2)]
    lite_attention(*inputs, masks, threshold=-4.0, backend="triton")
    words = [m.words.clone() for m in masks]
    assert all(m.density() < 1 for m in masks)
    monkeypatch.setattr(triton_launch, kernel, Broken())
    computed = torch.zeros(1, dtype=torch.int64, device=place)
    with pytest.raises(RuntimeError, match="launch failed"):
        lite_attention(*inputs, masks, threshold=-4.0, record=False, backend="triton", computed=computed)
    assert all(torch.equal(m.words, w) and m.passes == [1] for m, w in zip(masks, words, strict=True)), "only read"
    with pytest.raises(RuntimeError, match="launch failed"):
        lite_attention(*inputs, masks, threshold=-4.0, backend="triton", computed=computed)
    assert all(m.density() == 1 and m.passes == [0] for m in masks)
    assert computed.item() == 0


BLOCKS = [(128, 128, False), (128, 64, True), (128, 32, False), (64, 64, True), (64, 128, True), (32, 16, True)]


@pytest.mark.parametrize("n_q, n_k, dtype, threshold, blocks", [
    (300, 300, torch.float16, -3.0, BLOCKS),
    (300, 300, torch.float32, 0.0, BLOCKS[:5]),
    (100, 33 * 128 + 10, torch.float16, -3.0, BLOCKS[:2] + BLOCKS[3:4]),
], ids=["fp16", "fp32 threshold 0", "two words"])
def test_masks_do_not_depend_on_the_compute_tile(device, n_q, n_k, dtype, threshold, blocks):
    """BLOCK_M, BLOCK_N and where decisions are recorded change the launch, not one decision."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    from liteattention.kernels.launch_table import LaunchConfig
    from liteattention.kernels.triton_launch import triton_attention

    inputs = [x.to(device) for x in oracle.make(1, 1, n_q, n_k, 64, dtype)]
    start = SkipMask.from_bool(oracle.holes(1, 1, n_q, n_k, 0.8), n_q, n_k).to(device)
    found = []
    for block_m, block_n, in_registers in blocks:
        mask = start.clone()
        out = torch.empty_like(inputs[0])
        triton_attention(*inputs, out, None, [(mask, 0)], [False], threshold, True, None, 0.125, Workspace(), None,
                         config=LaunchConfig(block_m, block_n, 8, 2, in_registers))
        found.append((out, mask.words))
    expected = oracle.attention(*(x.cpu() for x in inputs), start.to_bool().cpu(), threshold)
    assert expected.margin.min() > 2e-3, "choose another seed: a decision is too close to call"
    assert expected.keep.sum() < start.active_tiles()
    for out, words in found:
        assert torch.equal(SkipMask(words, n_q, n_k).to_bool().cpu(), expected.keep)
        assert (out - found[0][0]).abs().max() < 2e-3
