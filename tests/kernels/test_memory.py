"""Which memory a call may read, write and keep."""

from contextlib import contextmanager

import kernel_oracle as oracle
import pytest
import torch

from liteattention.kernels import MustKeep, SkipMask, Workspace, lite_attention
from liteattention.kernels import workspace as workspace_module
from liteattention.kernels.torch_attention import torch_attention

F16 = torch.float16


def attend(backend, inputs, out, mask):
    """One recording call that writes to `out`, below `lite_attention` (which allocates its output itself)."""
    if backend == "triton":
        from liteattention.kernels.triton_launch import triton_attention as run
    else:
        run = torch_attention
    rows = [(mask, r) for r in range(mask.batch)]
    run(*inputs, out, None, rows, [False] * mask.batch, -4.0, True, None, 0.125, Workspace(), None)


@pytest.mark.parametrize("axis, shape, stride", [
    ("token", (1, 1, 400, 64), (0, 256, 2**23, 1)),
    ("head", (1, 2, 300, 64), (0, 2**31 + 64, 256, 1)),
    ("batch", (2, 1, 300, 64), (2**31 + 64, 0, 256, 1)),
])
def test_offsets_beyond_two_to_the_31_elements(backend, place, axis, shape, stride):
    """q, k, v and out as views whose far elements lie beyond 2^31; of 4 to 7 GB only the touched pages exist."""
    size = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 256
    assert size > 2**31
    if place.type == "cuda" and torch.cuda.mem_get_info()[0] < 2 * size * 1.2:
        pytest.skip("needs 8 GB of free GPU memory")
    memory = torch.empty(size, dtype=F16, device=place)
    batch, heads, n, _ = shape
    near = [x.to(place) for x in oracle.make(batch, heads, n, n, 64, F16)]
    far = [memory.as_strided(shape, stride, i * 64) for i in range(4)]
    for x, y in zip(far, near, strict=False):
        x.copy_(y)
    near.append(torch.empty_like(near[0]))
    masks = [SkipMask.full(batch, heads, n, device=place) for _ in range(2)]
    for (*inputs, out), mask in zip((near, far), masks, strict=True):
        attend(backend, inputs, out, mask)
    assert torch.equal(near[3], far[3]) and torch.equal(masks[0].words, masks[1].words)
    assert masks[0].density() < 1


@pytest.mark.parametrize("n", [384, 300])
def test_nothing_around_the_tensors_is_read_or_written(backend, place, n):
    """Inputs lie in a sea of NaN, the output and the mask words among values that have to survive."""
    guard = 200
    inputs = [x.to(place) for x in oracle.make(1, 2, n, n, 96, F16)]
    inside = []
    for x in inputs:
        sea = torch.full((1, 2, n + 2 * guard, 96), torch.nan, dtype=F16, device=place)
        sea[:, :, guard:guard + n] = x
        inside.append(sea[:, :, guard:guard + n])
    sea = torch.full((1, 2, n + 2 * guard, 96), 7.0, dtype=F16, device=place)
    out = sea[:, :, guard:guard + n]
    mask, alone = SkipMask.full(1, 2, n, device=place), SkipMask.full(1, 2, n, device=place)
    words = torch.full((mask.words.numel() + 64,), 5, dtype=torch.int32, device=place)
    words[32:-32] = mask.words.flatten()
    mask.words = words[32:-32].view_as(mask.words)
    plain = torch.empty_like(inputs[0])
    attend(backend, inputs, plain, alone)
    attend(backend, inside, out, mask)
    assert torch.equal(out, plain) and torch.equal(mask.words, alone.words) and alone.density() < 1
    assert (sea[:, :, :guard] == 7).all() and (sea[:, :, guard + n:] == 7).all()
    assert (words[:32] == 5).all() and (words[-32:] == 5).all()


@pytest.mark.parametrize("dtype", [F16, torch.float32])
def test_inputs_are_only_read(backend, place, dtype):
    inputs = [x.to(place) for x in oracle.make(1, 2, 300, 300, 64, dtype)]
    copies = [x.clone() for x in inputs]
    lite_attention(*inputs, SkipMask.full(1, 2, 300, device=place), threshold=-4.0, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_uninitialised_memory_never_shows(backend, place):
    """torch fills every `empty` with NaN or the largest integer here; results and masks stay the same."""
    inputs = [x.to(place) for x in oracle.make(1, 2, 300, 300, 64, F16)]
    start = SkipMask.from_bool(oracle.holes(1, 2, 300, 300, 0.7), 300, 300).to(place)
    start.words[0, 1, 1] = 0
    runs = []
    for fill in (False, True):
        mask = start.clone()
        torch.use_deterministic_algorithms(fill)
        try:
            assert not fill or torch.empty(3).isnan().all()
            out, lse = lite_attention(*inputs, mask, threshold=-4.0, backend=backend, return_lse=True)
            runs.append((out, lse, mask.words))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_calls_of_different_size_share_a_workspace(backend, place):
    """Buffers left by a larger call, or another layer, show neither in results nor in counts."""
    workspace = Workspace()
    for n in (640, 130, 300, 640):
        inputs = [x.to(place) for x in oracle.make(1, 1, n, n, 64, F16)]
        outs = []
        for shared in (workspace, None):
            mask = SkipMask.from_bool(oracle.holes(1, 1, n, n, 0.8), n, n).to(place)
            active = mask.active_tiles().item()
            computed = torch.zeros(1, dtype=torch.int64, device=place)
            out = lite_attention(*inputs, mask, threshold=-4.0, backend=backend, workspace=shared, computed=computed)
            assert computed.item() == active
            outs.append((out, mask.words))
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_workspace_grows_and_is_kept(place):
    """One buffer per name and device: kept for the same or a smaller request, replaced for a larger one."""
    entered = []

    @contextmanager
    def allocating():
        entered.append(True)
        yield

    workspace = Workspace(allocating)
    first = workspace.buffer("list", 100, torch.int16, place)
    assert workspace.buffer("list", 40, torch.int16, place).data_ptr() == first.data_ptr()
    assert workspace.nbytes == 200 and len(entered) == 1
    assert workspace.buffer("list", 300, torch.int16, place).numel() >= 300
    workspace.buffer("count", 10, torch.int32, place)
    assert workspace.nbytes == 640 and len(entered) == 3
    table = workspace.mask_table(((2**40, 1), (5, 0)), place)
    assert table.dtype == torch.int64 and table.tolist() == [[2**40, 1], [5, 0]]
    assert workspace.mask_table(((2**40, 1), (5, 0)), place) is table
    must = MustKeep(keys=((0, 10),))
    assert workspace.must_words(must, 300, 300, place).tolist() == [[1]] * 3
    held = workspace.must_words(must, 300, 300, place)
    assert workspace.must_words(MustKeep(keys=((0, 10),)), 300, 300, place) is held
    assert workspace.must_words(must, 300, 700, place) is not held
    assert len(entered) == 6
    workspace.close()
    assert workspace.nbytes == 0


def test_borrowed_memory_belongs_to_one_call_at_a_time(place):
    workspace = Workspace()
    with workspace.borrowed("keys", 100, torch.float32, place) as first:
        with workspace.borrowed("keys", 50, torch.float32, place) as second:
            assert first.data_ptr() != second.data_ptr() and second.numel() >= 50
        assert not first.is_inference()
    with workspace.borrowed("keys", 80, torch.float32, place) as again:
        assert again.data_ptr() == first.data_ptr()
    assert workspace.nbytes == 400


def test_tables_of_a_workspace_are_limited(place, monkeypatch):
    """A caller that brings new masks at every call costs a table each, not memory without end."""
    workspace = Workspace()
    monkeypatch.setattr(workspace_module, "_TABLE_LIMIT", 8)
    for i in range(30):
        assert workspace.mask_table(((i, 0),), place).tolist() == [[i, 0]]
    assert workspace.nbytes == 8 * 16


def test_what_a_workspace_keeps_can_be_written_outside_inference_mode(place):
    with torch.inference_mode():
        workspace = Workspace()
        held = [workspace.buffer("list", 8, torch.int16, place), workspace.mask_table(((1, 0),), place),
                workspace.must_words(MustKeep(keys=((0, 1),)), 300, 300, place)]
    assert not any(x.is_inference() for x in held)
