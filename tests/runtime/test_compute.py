"""The sparse kernel in a run: where it runs, what it does without, and what a failure costs."""

import math

import pytest
import torch
from run_kit import HEADS, D, N, dense, play, sampling_run, tokens

from liteattention.kernels import BackendChoice, PrecisionChoice, SkipMask, UnsupportedAttention
from liteattention.runtime import AttentionCall, ErrorBudget, LiteAttentionConfig, Threshold, compute
from liteattention.runtime.compute import Plan, SparseAttention, is_out_of_memory
from liteattention.runtime.masks import LayerKey, MaskTable, Signature
from liteattention.runtime.notes import Notes
from liteattention.runtime.reasons import KERNEL_FAILED, NO_BACKEND, NO_MEMORY, UNSUPPORTED
from liteattention.runtime.rules import SkipTest

CPU = torch.device("cpu")
KEY = LayerKey("m", CPU, "double 0")


class Room:
    """Only the sparse kernel of a run, without a forward pass around it."""

    def __init__(self, **settings):
        self.notes = Notes()
        self.masks = MaskTable(note=self.notes.add)
        self.sparse = SparseAttention(LiteAttentionConfig(**settings), self.masks, self.notes)
        self.computed = torch.zeros(4, dtype=torch.int64)

    def compute(self, step=0, key=KEY, threshold=-4.0, restart=False):
        q, k, v = tokens(step)
        plan = Plan(key, ["a", "b"], Signature(HEADS, N, D, q.dtype), range(HEADS), SkipTest(threshold, "max"), None,
                    restart)
        return self.sparse.compute(AttentionCall.from_hook(q, k, v, HEADS), plan, self.computed)


def test_a_plan_becomes_a_result_the_masks_and_the_count_of_its_tiles():
    room = Room()
    out, fresh = room.compute()
    assert torch.allclose(out, dense(*tokens(0)), atol=1e-5) and fresh == 2
    assert room.computed.sum() == 2 * HEADS * 25
    out, fresh = room.compute(1)
    assert fresh == 0 and room.computed.sum() < 4 * HEADS * 25
    out, fresh = room.compute(1, restart=True)
    assert torch.allclose(out, dense(*tokens(1)), atol=1e-5) and fresh == 2, "rows start anew and see every tile"


def test_a_call_that_the_kernel_does_not_serve_stays_dense_and_nothing_else_changes(kernel):
    room = Room()
    room.compute()
    before = {row: mask.clone() for row, mask in room.masks.all_masks()[KEY].items()}
    kernel.fails = lambda kwargs: UnsupportedAttention("q", 1, "2", "not today")
    for _ in range(2):
        reason = room.compute(1)
    assert (reason.text, reason.hint) == ("not today", UNSUPPORTED.hint)
    assert room.sparse.reason(KEY) is None and room.notes.lines() == [
        "layer double 0: the call stays dense: q is 1; allowed: 2"]
    for row, mask in room.masks.all_masks()[KEY].items():
        assert torch.equal(mask.words, before[row].words) and mask.passes == before[row].passes


def test_a_kernel_that_fails_is_not_tried_again_and_its_masks_are_forgotten(kernel, caplog):
    room = Room()
    room.compute()
    kernel.fails = lambda kwargs: RuntimeError("no kernel image")
    assert room.compute(1) == KERNEL_FAILED
    assert room.sparse.failed and room.sparse.reason(LayerKey("m", CPU, "another")) == KERNEL_FAILED
    note, = room.notes.lines()
    assert note.startswith("layer double 0: the kernel failed") and "RuntimeError: no kernel image" in note
    assert not room.masks.all_masks() and caplog.text.count("no kernel image") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("mask"), RuntimeError("not enough memory: you tried")])
def test_a_layer_without_memory_for_its_mask_stays_dense_alone_and_is_not_tried_again(monkeypatch, error):
    room, tries, full = Room(), [], SkipMask.full

    def scarce(*args, **kwargs):
        tries.append(1)
        if len(tries) == 2:  # the second row of the first layer
            raise error
        return full(*args, **kwargs)

    monkeypatch.setattr(SkipMask, "full", scarce)
    assert room.compute() == room.sparse.reason(KEY) == NO_MEMORY and not room.masks.nbytes
    assert room.notes.lines() == ["layer double 0: no memory for the skip mask; the layer stays dense"]
    assert isinstance(room.compute(key=LayerKey("m", CPU, "double 1")), tuple)


def test_any_other_trouble_with_a_mask_is_a_failure_of_the_kernel(monkeypatch):
    room = Room()

    def full(*args, **kwargs):
        raise ValueError("seqlen_k is 5000000")

    monkeypatch.setattr(SkipMask, "full", full)
    assert room.compute() == KERNEL_FAILED and "5000000" in room.notes.lines()[0]


@pytest.fixture
def int8_device(monkeypatch):
    """precision_choice of a GPU with INT8; the torch backend computes in full precision all the same."""
    monkeypatch.setattr(compute, "precision_choice", lambda device, head_dim, dtype, seqlen, requested, backend:
                        PrecisionChoice("full" if requested == "full" else "int8"))


def out_of_memory(needs):
    return lambda kwargs: torch.OutOfMemoryError("buffer") if needs(kwargs) else None


def tried(kernel):
    return [(kwargs["precision"], kwargs["pool_skipped"]) for kwargs in kernel.calls]


def test_without_memory_for_int8_the_call_and_the_run_go_on_in_full_precision(kernel, int8_device, caplog):
    run, plain = sampling_run(8, warmup_steps=1), sampling_run(8, warmup_steps=1)
    expected = play(plain, 4)
    kernel.calls.clear()
    kernel.fails = out_of_memory(lambda kwargs: kwargs["precision"] == "int8" and len(kernel.calls) > 3)
    assert play(run, 4) == expected
    assert tried(kernel) == [("int8", True)] * 4 + [("full", True)] * 5
    assert run.close().notes == ["no memory for the INT8 copies of q and k; precision is full for the rest of this run"]
    assert caplog.text.count("INT8 copies") == 1


def test_without_memory_for_pooled_keys_and_values_the_run_goes_on_without_them(kernel):
    kernel.fails = out_of_memory(lambda kwargs: kwargs["pool_skipped"])
    run = sampling_run(6)
    assert play(run, 3)[1] == [0, 0, 0]
    assert tried(kernel) == [("full", True)] + [("full", False)] * 6
    note, = run.close().notes
    assert note == "no memory for the pooled keys and values; pool_skipped is off for the rest of this run"


def test_no_memory_without_either_is_the_hosts_business_and_no_half_written_mask_stays(kernel, int8_device):
    room = Room()
    room.compute()
    kernel.calls.clear()
    kernel.fails = out_of_memory(lambda kwargs: True)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            room.compute(1)
    assert tried(kernel) == [("int8", True), ("full", True), ("full", False), ("full", False)]
    assert not room.masks.all_masks() and not room.sparse.failed and len(room.notes.lines()) == 2


def test_an_int8_call_that_fails_otherwise_is_not_tried_again(kernel, int8_device):
    room = Room()
    kernel.fails = lambda kwargs: RuntimeError("no kernel image")
    assert room.compute() == KERNEL_FAILED and len(kernel.calls) == 1


def test_two_devices_that_run_out_of_memory_at_once_give_up_one_thing(kernel, int8_device):
    """Both have tried with INT8; the second one finds it switched off already and tries again with what there is."""
    sparse = Room().sparse
    assert sparse._do_without("int8", True) and sparse._do_without("int8", True) and sparse._pool_skipped
    assert sparse._do_without("full", True) and not sparse._pool_skipped and not sparse._do_without("full", False)


def test_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))


@pytest.mark.parametrize("rule, criterion, threshold", [(Threshold(-4.0), "max", -4.0), (ErrorBudget(0.3), "mass",
                                                        math.log2(0.3 / 5))], ids=["threshold", "640 keys, five tiles"])
@pytest.mark.parametrize("pooled", [True, False])
def test_settings_reach_every_call(kernel, rule, criterion, threshold, pooled):
    play(sampling_run(6, rule=rule, pool_skipped=pooled), 3)
    assert [(call["criterion"], call["threshold"], call["pool_skipped"]) for call in kernel.calls] == \
        [(criterion, threshold, pooled)] * 6


@pytest.mark.parametrize("precision", ["auto", "full"])
def test_full_precision_on_a_cpu_is_no_news(kernel, precision):
    run = sampling_run(4, precision=precision)
    play(run, 2)
    assert {kwargs["precision"] for kwargs in kernel.calls} == {"full"} and run.close().notes == []


def test_int8_that_was_asked_for_and_is_not_there_is_noted_once(kernel, caplog):
    run = sampling_run(4, precision="int8")
    play(run, 3)
    note, = run.close().notes
    assert note.startswith("precision is full, not int8") and "Triton" in note
    assert caplog.text.count("not int8") == 1 and {kwargs["precision"] for kwargs in kernel.calls} == {"full"}


@pytest.mark.parametrize("wanted", [True, False])
def test_pooled_keys_that_fail_the_self_test_are_done_without(kernel, monkeypatch, wanted):
    choice = BackendChoice("torch", True, "the self-test ended with signal 6", False)
    monkeypatch.setattr(compute, "resolve_backend", lambda device: choice)
    run = sampling_run(4, pool_skipped=wanted)
    play(run, 3)
    assert not any(kwargs["pool_skipped"] for kwargs in kernel.calls)
    assert run.close().notes == wanted * ["pool_skipped is off on cpu. the self-test ended with signal 6"]


def test_a_gpu_without_triton_stays_dense_and_one_line_says_what_to_install(monkeypatch, caplog):
    hint = "Triton is not installed; for torch 2.11 on Windows run: python -m pip install triton-windows"
    monkeypatch.setattr(compute, "resolve_backend", lambda device: BackendChoice("torch", False, hint))
    room = Room()
    assert [room.sparse.backend(torch.device("cuda", i)) for i in (0, 0, 0)] == [None] * 3
    assert caplog.text.count(hint) == 1 and room.notes.lines() == [f"LiteAttention is off on cuda:0. {hint}"]
    assert room.sparse.describe() == ""
    monkeypatch.setattr(compute, "resolve_backend", lambda device: BackendChoice("torch", True))
    room = Room()
    assert room.sparse.backend(torch.device("cuda")) == "torch", "unless it was asked for by name"
    assert room.sparse.describe() == "torch backend on cuda"


@pytest.mark.parametrize("error", [RuntimeError("CUDA driver error"), None])
def test_a_backend_that_cannot_be_asked_ends_no_render(monkeypatch, error):
    said = "CUDA driver error"
    if error is None:
        monkeypatch.setenv("LITEATTENTION_BACKEND", "tritn")
        said = "LITEATTENTION_BACKEND is 'tritn'; allowed: auto, triton, torch"
    else:
        def resolve(device):
            raise error

        monkeypatch.setattr(compute, "resolve_backend", resolve)
    run = sampling_run(4)
    assert play(run, 1)[1] == [2]
    summary = run.close()
    assert summary.dense_calls == {NO_BACKEND: 2} and said in summary.notes[0]
