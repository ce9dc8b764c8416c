"""ComfyUI may record the allocations inside a block and replay them: nothing outlives its block that was not made while
the recorder was paused, and within a phase every step allocates the same.

A simulated recorder watches 20 steps: warm-up, recording, skipping, a late prompt, another size, layers that become
dense, INT8 copies, pooled keys and values, dense end. With the Triton backend kernels do nothing here; what its host
side allocates is the same.
"""

import gc
from contextlib import contextmanager

import pytest
import torch
from run_kit import HEADS, LAYERS, dense, sampling_run, tokens
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liteattention.kernels import BackendChoice, api
from liteattention.kernels.precision import PrecisionChoice
from liteattention.runtime import AttentionCall, BreakEvens, SamplingRun, compute

STEPS, LATE_ROW, RESIZED, TRIAL_ENDS = 20, 10, 14, 7
CHANGES = {0, 1, 2, 3, TRIAL_ENDS, LATE_ROW, RESIZED, STEPS - 2}
"""Steps in which something may be allocated that the step before did not."""


class Recorder(TorchDispatchMode):
    """Sees every new storage that is made in a block while it is not paused."""

    def __init__(self):
        super().__init__()
        self.paused, self.made = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given and not self.paused:
                self.made.append((x.untyped_storage().nbytes(), StorageWeakRef(x.untyped_storage())))
        return out

    @contextmanager
    def pause(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def block(self, forward_pass, layer, inputs):
        """(sizes of what a block allocates, sizes of those that are alive once its result is gone)."""
        self.made.clear()
        call = AttentionCall.from_hook(*inputs, HEADS)
        with self:
            forward_pass.attend(call, layer, lambda: dense(*inputs))
        gc.collect(0)
        return [size for size, _ in self.made], [size for size, held in self.made if not held.expired()]


class NoKernel:
    """In the place of a Triton kernel."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(params=["torch", "triton", "triton, INT8"])
def backend(request, monkeypatch):
    name, int8 = request.param.split(",")[0], "INT8" in request.param
    if name == "triton":
        pytest.importorskip("triton", reason="Triton is not installed on this system")
        from liteattention.kernels import triton_launch

        kernels = [name for name in vars(triton_launch) if name.endswith("_kernel")]
        assert len(kernels) >= 7
        for kernel in kernels:
            monkeypatch.setattr(triton_launch, kernel, NoKernel())
    monkeypatch.setattr(compute, "resolve_backend", lambda device: BackendChoice(name, True))
    monkeypatch.setattr(api, "choose_backend", lambda device, wanted: name)
    for module in (compute, api):
        monkeypatch.setattr(module, "precision_choice", lambda *args: PrecisionChoice("int8" if int8 else "full"))
    return name


def inputs(backend, step, n):
    return [x.half() if backend == "triton" else x for x in tokens(step, n)]


def test_nothing_outlives_its_block_and_a_phase_allocates_the_same_at_every_step(backend):
    recorder = Recorder()
    config = sampling_run(dense_end_steps=2, warmup_steps=3, pool_skipped=True).config
    dense_wins = BreakEvens(lambda *args: 0.05, lambda device: None)
    run = SamplingRun(config, STEPS, allocating=recorder.pause, break_evens=dense_wins)
    before = {}
    for step in range(STEPS):
        rows = ["negative", "positive"] if step < LATE_ROW else ["negative", "another"]
        n = 640 if step < RESIZED else 512
        forward_pass = run.forward_pass(model="m", rows=[(row, 0) for row in rows], video_tokens=n - 40)
        for layer in LAYERS:
            made, alive = recorder.block(forward_pass, layer, inputs(backend, step, n))
            assert not alive, (step, layer)
            # The torch backend gathers what is active; where it runs nothing is recorded.
            assert step in CHANGES or backend == "torch" or made == before[layer], (step, layer)
            before[layer] = made
        run.end_step(step)
    summary = run.close()
    assert run.masks.peak_bytes > 0 and summary.sparse_calls >= 8 and not run.sparse.failed, summary.notes


def test_the_recorder_sees_what_stays(backend):
    """Or the test above shows little: with a pause that does nothing, masks are seen to outlive their block."""
    recorder = Recorder()
    run = SamplingRun(sampling_run(warmup_steps=1).config, 8)
    forward_pass = run.forward_pass(model="m", rows=[("negative", 0), ("positive", 0)], video_tokens=600)
    assert recorder.block(forward_pass, LAYERS[0], inputs(backend, 0, 640))[1]
    run.close()
