"""Faults at every point of a run: it stays dense or ends with its error, and the next prompt is right."""

import gc
import logging
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from host_kit import LAYERS, dense_calls

from liteattention.kernels import BackendChoice, SkipMask, api
from liteattention.runtime import BreakEvens, CarriedMasks, ForwardPass, RunHandle, RunSummary, SamplingRun, reasons
from liteattention.runtime import compute as compute_module
from liteattention.runtime import forward as forward_module
from liteattention.runtime import run as run_module
from liteattention.runtime.counters import Counters
from liteattention.runtime.masks import MaskTable
from liteattention.runtime.timing import AttentionTimes

attach = sys.modules["liteattention.host.attach"]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
SIZE, STEPS, CALLS = (5, 16, 16), 3, 3 * LAYERS
GOES_ON, STAYS_DENSE, ENDS = "goes on with LiteAttention", "stays dense", "ends with its error"
TRITON = "liteattention.kernels.triton_launch"


@dataclass
class Fault:
    """One row of docs/faults.md.

    Attributes:
        break_it: (patch, host) -> None puts the fault there.
        error: what the run raises.
        said: a part of the summary or, after `in_log`, of the log.
        tries: how often the broken thing may be called, where that is told.
    """

    where: str
    what: str
    then: str
    said: str
    break_it: Callable
    error: type | None = None
    settings: dict = field(default_factory=dict)
    in_log: bool = False
    tries: int | None = None


def again(error):
    """An error of the same kind: one that was raised holds on to the frames it came through."""
    return type(error)(*error.args)


def failing(error, at=(1,), then=lambda *args, **kwargs: None):
    """A function that raises in its calls of these numbers, None: in every one."""
    def function(*args, **kwargs):
        function.calls += 1
        if at is None or function.calls in at:
            raise again(error)
        return then(*args, **kwargs)

    function.calls = 0
    return function


def method(owner, name, error, at=None):
    """Breaks an attribute; its calls are counted in `host.calls`."""
    def break_it(patch, host):
        original = getattr(owner, name)
        host.broken = failing(error, at, original)
        patch.setattr(owner, name, staticmethod(host.broken) if isinstance(owner, type) and name == "full"
                      else lambda *args, **kwargs: host.broken(*args, **kwargs))

    return break_it


def triton(error, at=None, missing=False):
    """A device where Triton's self-test has passed; the kernels fail later."""
    def break_it(patch, host):
        patch.setattr(compute_module, "resolve_backend", lambda device: BackendChoice("triton", False))
        patch.setattr(api, "choose_backend", lambda device, backend: backend)

        def dense(q, k, v, out, *args, **kwargs):
            out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v))

        host.broken = failing(error, at, dense)
        module = types.ModuleType(TRITON)
        if not missing:
            module.triton_attention = host.broken
        patch.setitem(sys.modules, TRITON, None if missing else module)

    return break_it


def wrapper(kind, error):
    def break_it(patch, host):
        host.model.add_wrapper_with_key(kind, "test", failing(error, None))

    return break_it


def on_load(error):
    def break_it(patch, host):
        host.model.add_callback_with_key(CallbacksMP.ON_LOAD, "test", failing(error, None))
        comfy.model_management.unload_all_models()

    return break_it


def callback(error):
    def break_it(patch, host):
        host.callback = failing(error, (2,))

    return break_it


def fallback(error):
    """The attention patched before fails; it computes the dense calls."""
    def break_it(patch, host):
        host.before.error = error

    return break_it


def timing(name, error):
    def break_it(patch, host):
        table = BreakEvens(lambda *args: 1.0, lambda device: None)
        patch.setattr(table, name, failing(error, None))
        patch.setattr(run_module, "AttentionTimes", lambda _, *others: AttentionTimes(table, *others))

    return break_it


def text_on_the_node(patch, host):
    instance = types.SimpleNamespace(send_progress_text=failing(OSError("socket closed"), None))
    patch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance)))


OOM, BUG = torch.OutOfMemoryError("out of memory"), RuntimeError("a bug")
STOP = comfy.model_management.InterruptProcessingException()
FAILED = reasons.KERNEL_FAILED.text
FAULTS = [
    Fault("start of the run", "the model's options are not understood", STAYS_DENSE, "options are not understood",
          method(attach.model_call, "pass_fingerprint", BUG, (1,))),
    Fault("start of the run", "the backend cannot be asked", STAYS_DENSE, reasons.NO_BACKEND.text,
          method(compute_module, "resolve_backend", BUG)),
    Fault("start of the run", "out of memory while the model loads", ENDS, "no attention call", on_load(OOM),
          torch.OutOfMemoryError),
    Fault("start of the run", "out of memory while sampling is prepared", ENDS, "no attention call",
          wrapper(WrappersMP.PREPARE_SAMPLING, OOM), torch.OutOfMemoryError),
    Fault("start of the run", "the sampler fails", ENDS, "no attention call", wrapper(WrappersMP.SAMPLER_SAMPLE, BUG),
          RuntimeError),
    Fault("call of the model", "its rows are not understood", STAYS_DENSE, "not understood",
          method(attach.model_call, "row_names", BUG)),
    Fault("call of the model", "its context window is not understood", STAYS_DENSE, "not understood",
          method(attach.model_call, "window_key", BUG)),
    Fault("call of the model", "its video tokens cannot be counted", STAYS_DENSE, "not understood",
          method(attach.families, "video_tokens", BUG)),
    Fault("call of the model", "its blocks cannot be numbered", GOES_ON, "cannot be numbered",
          method(attach.families, "numbered", BUG)),
    Fault("attention override", "the layer cannot be told", STAYS_DENSE, reasons.NO_LAYER.text,
          method(attach.model_call, "layer_id", BUG)),
    Fault("attention override", "a check of the call fails", STAYS_DENSE, FAILED,
          method(forward_module, "call_reason", BUG, (1,)), tries=None),
    Fault("attention override", "the attention patched before fails", ENDS, "cross-attention", fallback(BUG),
          RuntimeError),
    Fault("attention override", "interrupted inside a model call", ENDS, "cross-attention", fallback(STOP),
          comfy.model_management.InterruptProcessingException),
    Fault("masks", "out of memory for one", STAYS_DENSE, reasons.NO_MEMORY.text, method(SkipMask, "full", OOM),
          tries=LAYERS),
    Fault("masks", "another error for one", STAYS_DENSE, FAILED, method(SkipMask, "full", BUG), tries=1),
    Fault("masks", "those of the run before cannot be read", STAYS_DENSE, FAILED, method(CarriedMasks, "find", BUG),
          settings={"continued": True}, tries=1),
    Fault("kernel launch", "fails in the first call", STAYS_DENSE, "a bug",
          method(compute_module, "lite_attention", BUG), tries=1),
    Fault("kernel launch", "fails in mid-run", STAYS_DENSE, "a bug",
          method(compute_module, "lite_attention", BUG, (LAYERS + 2,)), tries=LAYERS + 2),
    Fault("kernel launch", "out of memory with pooled keys", GOES_ON, "no memory for the pooled keys",
          method(compute_module, "lite_attention", OOM, (3,))),
    Fault("kernel launch", "out of memory, also without pooled keys", ENDS, "no memory for the pooled keys",
          method(compute_module, "lite_attention", OOM), torch.OutOfMemoryError, tries=2),
    Fault("kernel launch", "Triton does not compile", STAYS_DENSE, "at 1:0: unsupported", triton(
          ValueError("at 1:0: unsupported")), tries=1),
    Fault("kernel launch", "Triton does not launch", STAYS_DENSE, "an illegal memory access", triton(
          RuntimeError("Triton Error [CUDA]: an illegal memory access"), (LAYERS + 1,)), tries=LAYERS + 1),
    Fault("kernel launch", "Triton asks for more than the GPU has", STAYS_DENSE, "out of resource: shared memory",
          triton(RuntimeError("out of resource: shared memory, Required: 1, Hardware limit: 0")), tries=1),
    Fault("kernel launch", "Triton cannot be imported", STAYS_DENSE, "triton_launch", triton(None, (), True), tries=0),
    Fault("counters", "out of memory for them", ENDS, "no attention call",
          method(Counters, "on_device", OOM), torch.OutOfMemoryError),
    Fault("counters", "a call cannot be counted", STAYS_DENSE, FAILED,
          method(Counters, "add_sparse", BUG), tries=1),
    Fault("end of a step", "its counters cannot be read", GOES_ON, "the counters of some steps are not known",
          method(Counters, "end_step", BUG)),
    Fault("end of a step", "the text does not reach the node", GOES_ON, "skipped", text_on_the_node),
    Fault("end of a step", "the callback of the sampler fails", ENDS, "skipped", callback(BUG), RuntimeError),
    Fault("end of a step", "interrupted in the callback", ENDS, "skipped", callback(STOP),
          comfy.model_management.InterruptProcessingException),
    Fault("timing", "break-evens cannot be looked up", GOES_ON, "attention cannot be timed", timing("of", BUG)),
    Fault("timing", "timings cannot be collected", GOES_ON, "attention cannot be timed", timing("collect", BUG)),
    Fault("end of the run", "masks cannot be carried over", GOES_ON, "the masks of this run could not be carried over",
          method(MaskTable, "carry", OOM), tries=1),
    Fault("end of the run", "the handle cannot take its masks", GOES_ON, "lost to later nodes",
          method(RunHandle, "finish", BUG), tries=1),
    Fault("end of the run", "the summary cannot be made", GOES_ON, "the run summary is lost",
          method(SamplingRun, "_summarize", BUG), in_log=True),
    Fault("end of the run", "the summary cannot be shown", GOES_ON, "the run summary is lost",
          method(RunSummary, "text", BUG), in_log=True),
]


class Host:
    """A patched model with an attention patched before, and what a fault needs to know."""

    def __init__(self, kit, settings):
        settings = dict(settings)
        self.callback, self.broken = None, types.SimpleNamespace(calls=None)
        self.handle, first = RunHandle(), RunHandle()
        self.handles = self.handle, first

        def before(func, *args, **kwargs):
            before.calls += 1
            if before.error is not None and before.calls >= LAYERS + 2:
                raise again(before.error)
            return func(*args, **kwargs)

        before.error, before.calls, self.before = None, 0, before
        base = kit.model.clone()
        base.model_options["transformer_options"]["optimized_attention_override"] = before
        self.first = None
        if settings.pop("continued", False):
            self.first = kit.lite(base, first, **settings)
        self.model = kit.lite(base, self.handle, continue_from=first if self.first else None, **settings)


def sample(kit, model, **kwargs):
    return kit.sample(model, steps=STEPS, size=SIZE, **kwargs)


def alive(*handles):
    """Objects of a run that are alive, those that belong to the handles left out."""
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, (SkipMask, SamplingRun, ForwardPass, MaskTable))
            and not any(x is carried.mask for handle in handles for carried in handle.masks or ())]


@pytest.fixture(scope="module")
def clean(kit):
    """Latents without a fault, with LiteAttention and without."""
    made = {}
    gc.collect()
    gc.freeze()  # what is there already is of no interest, and takes a second to look through

    def latents():
        if not made:
            made.update(lite=sample(kit, kit.lite()), dense=sample(kit, kit.model))
        return made["lite"], made["dense"]

    yield latents
    gc.unfreeze()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.where}: {fault.what}")
def test_a_fault_and_the_prompt_after_it(kit, clean, fault, caplog, record_property):
    caplog.set_level(logging.INFO, "LiteAttention")
    alone, dense = clean()
    assert not torch.equal(alone, dense)
    host = Host(kit, fault.settings)
    healthy = host.model
    expected = alone
    if host.first is not None:
        sample(kit, host.first)
        expected = sample(kit, healthy)
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        if fault.error is not None:
            host.model = healthy.clone()
        fault.break_it(patch, host)
        if fault.error is None:
            out = sample(kit, host.model, callback=host.callback)
        else:
            with pytest.raises(fault.error):
                sample(kit, host.model, callback=host.callback)
            out = None
    said = caplog.text if fault.in_log else host.handle.summary.text()
    assert fault.said in said
    assert all(caplog.text.count(note) <= 2 for note in (host.handle.summary.notes if host.handle.summary else [])), \
        "once as a warning, once in the summary"
    if fault.tries is not None:
        assert host.broken.calls == fault.tries, "what has failed is not tried again at every call"
    if fault.then == STAYS_DENSE:
        assert torch.isfinite(out).all()
        taken = host.handle.summary.sparse_calls
        assert torch.equal(out, dense) if not taken else dense_calls(host.handle.summary)[FAILED] == CALLS - taken
    elif fault.then == GOES_ON and "pooled" not in fault.what:
        assert torch.equal(out, alone)

    # ComfyUI keeps working: nothing hangs in the models, nothing of the run is alive, the next prompt is as if alone.
    host.before.error, host.handle = None, None
    for model in (healthy, host.model):
        assert attach.KEY not in model.model_options["transformer_options"]
    del out
    del host.first
    assert not alive(*host.handles)
    assert torch.equal(sample(kit, healthy), expected)
    record_property("counted", ("faults survived", 1, None))


def test_the_table_in_the_docs_is_this_list():
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|"))
            for line in DOCS.read_text(encoding="utf-8").splitlines() if re.match(r"\| (?!point|---)", line)]
    assert rows == [(fault.where, fault.what, fault.then, fault.said) for fault in FAULTS]
