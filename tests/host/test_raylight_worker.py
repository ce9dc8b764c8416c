"""A worker's side of Raylight in this process: which calls stay dense and why, and what happens before a run."""

import sys
import types

import pytest
import ring_kit
import torch
from family_cases import CASES
from family_cases import case as family_case
from family_kit import CROSS, load, sample

from liteattention.host import families
from liteattention.host.raylight import doors, worker
from liteattention.host.raylight.worker import Parallel
from liteattention.host.share import WHOLE
from liteattention.runtime import LiteAttentionConfig, SamplingRun, Threshold, reasons
from liteattention.runtime.merged_summary import from_plain

SETTINGS = {"rule": ("Threshold", -1.0), "min_tokens": 128, "warmup_steps": 1}
ULYSSES = {"is_xdit": True, "ulysses_degree": 2, "ring_degree": 1, "cfg_degree": 1}
PIPEFUSION = {"pipefusion_enabled": True, "is_xdit": True, "ulysses_degree": 1}
INNER_KEY = "raylight_inner_attention"
HEADS, TOKENS, D = 2, 700, 64


@pytest.fixture
def inner_attention(monkeypatch):
    """A Raylight that has it."""
    module = types.ModuleType(doors.INNER)
    module.INNER_ATTENTION_KEY = INNER_KEY
    for name in ("raylight", "raylight.distributed_modules", doors.INNER):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("given, understood", [
    ({}, Parallel()), ({"is_xdit": False, "ulysses_degree": 4}, Parallel()), (ULYSSES, Parallel(2)),
    ({"is_xdit": True, "ulysses_degree": 2, "ring_degree": 2, "cfg_degree": 2}, Parallel(2, 2, 2)),
    ({"is_xdit": True, "ulysses_degree": None}, Parallel()), (PIPEFUSION, Parallel(pipefusion=True))])
def test_how_raylight_splits_a_model_is_read_from_its_own_dictionary(given, understood):
    assert Parallel.of(given) == understood


def test_one_sequence_is_served_and_a_text_that_is_cut_apart_is_not():
    def network(name):
        return type(name, (torch.nn.Module,), {})()

    served = {name for name in families.FAMILIES if worker._stays_dense(network(name), Parallel(2)) is None}
    assert {"WanModel", "VaceWanModel", "CameraWanModel", "MiniMaxH3Model"} <= served
    assert all(worker._stays_dense(network(name), Parallel(2)) == reasons.CUT_APART
               for name in ("Flux", "HunyuanVideo", "QwenImageTransformer2DModel", "LTXVModel", "Unknown"))
    assert worker._stays_dense(network("WanModel"), Parallel(ring=2)) == reasons.RING


def test_backend_and_kernels_are_asked_for_in_the_nodes_call_and_not_with_it_off(kit, monkeypatch):
    asked = []
    monkeypatch.setattr(worker, "prepare", lambda *given: asked.append(given))
    model = worker.apply(kit.model, SETTINGS, {})
    config = LiteAttentionConfig(rule=Threshold(-1.0), min_tokens=128, warmup_steps=1)
    assert asked == [(config, kit.model.load_device, 128, torch.float32)]
    worker.apply(model, None, {})
    assert len(asked) == 1


def test_without_a_model_it_says_what_to_connect():
    assert worker.last_run(None) == (worker.NOT_ATTACHED, None)
    with pytest.raises(ValueError, match="No model is loaded"):
        worker.apply(None, SETTINGS, {})


def test_pipefusion_stays_dense_and_says_what_to_choose(kit):
    model = worker.apply(kit.model, SETTINGS, PIPEFUSION)
    assert torch.equal(kit.sample(model), kit.sample(kit.model))
    state, plain = worker.last_run(model)
    run = from_plain(plain)
    assert state == worker.DONE and not run.sparse_calls and reasons.PIPEFUSION.hint in run.headline()


class Held:
    """A forward pass that an attention call of Raylight comes from."""

    def __init__(self):
        self.run = SamplingRun(LiteAttentionConfig(rule=Threshold(-1.0), min_tokens=128, warmup_steps=0), 4)
        forward_pass = self.run.forward_pass(model="m", rows=["row"], video_tokens=TOKENS)
        attach = sys.modules["liteattention.host.attach"]
        self.options = {attach.KEY: types.SimpleNamespace(share=WHOLE), "block_index": 0, "block_type": "double",
                        attach.FORWARD_KEY: ("owner", self.run, forward_pass)}
        self.calls = 0

    def attend(self, fails=None, **keywords):
        q, k, v = torch.randn(3, 1, TOKENS, HEADS, D, generator=torch.Generator().manual_seed(1)).unbind()

        def dense(q, k, v, **others):
            self.calls += 1
            if fails is not None:
                raise fails
            return torch.full_like(q, 7.0), None, None

        return doors.InnerAttention()(dense, q, k, v, transformer_options=self.options, **keywords)


@pytest.fixture
def held():
    return Held()


@pytest.mark.parametrize("keywords, reason", [
    ({"causal": True}, reasons.CAUSAL), ({"joint_tensor_key": torch.zeros(1)}, reasons.CUT_APART),
    ({"dropout_p": 0.5}, reasons.UNSUPPORTED), ({"window_size": (4, 4)}, reasons.UNSUPPORTED)])
def test_calls_that_are_no_plain_self_attention_are_dense_and_counted(held, keywords, reason):
    out = held.attend(**keywords)
    assert out[0].eq(7).all() and held.calls == 1 and held.run.close().dense_calls == {reason: 1}


def test_a_plain_call_is_sparse_and_dense_attention_is_not_called(held):
    out = held.attend(causal=False, dropout_p=0.0, window_size=(-1, -1), alibi_slopes=None, joint_tensor_key=None)
    assert out.shape == (1, TOKENS, HEADS, D) and not held.calls and held.run.close().sparse_calls == 1


def test_the_scale_is_that_of_the_call(held):
    assert not torch.equal(held.attend(softmax_scale=0.01), held.attend(softmax_scale=1.0))


def test_out_of_memory_in_the_kernel_goes_on_dense_for_the_rest_of_the_run(held, monkeypatch):
    def scarce(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sys.modules["liteattention.runtime.compute"], "lite_attention", scarce)
    for times in (1, 2):
        assert held.attend()[0].eq(7).all() and held.calls == times
    monkeypatch.undo()
    held.attend()
    run = held.run.close()
    assert run.dense_calls == {reasons.OUT_OF_MEMORY: 3} and not run.sparse_calls


@pytest.mark.parametrize("keywords", [{}, {"causal": True}])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("dense"), ValueError("dense")])
def test_what_dense_attention_raises_is_raised_and_it_is_not_called_again(held, error, keywords):
    held.run.sparse.run_out()
    with pytest.raises(type(error), match="dense"):
        held.attend(error, **keywords)
    assert held.calls == 1


def test_calls_of_another_model_are_left_alone(held):
    held.options.clear()
    assert held.attend(causal=True)[0].eq(7).all() and held.calls == 1


SERVED = [case for case in CASES if case.network.split(":")[1] in ("WanModel", "VaceWanModel", "CameraWanModel")]


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_every_self_attention_of_wan_goes_through_xfusers_ring(case, monkeypatch):
    import comfy.ldm.wan.model as wan

    monkeypatch.setitem(sys.modules, doors.RING, ring_kit)
    monkeypatch.setattr(ring_kit, "select_flash_attn_impl", ring_kit.select_flash_attn_impl)  # put back at the end
    monkeypatch.setattr(wan, "optimized_attention", ring_kit.attention)
    model = load(case)
    dense = sample(case, model)
    lite = worker.apply(model, {**SETTINGS, "rule": ("Threshold", -30.0)}, ULYSSES)
    out = sample(case, lite)
    run = from_plain(worker.last_run(lite)[1])
    assert run.sparse_calls == len(case.layers) * run.forward_passes and not run.notes
    assert {reason.text for reason in run.dense_calls} == {CROSS}
    assert (out - dense).abs().max() < 1e-3 * dense.abs().max()
    assert not any(block._forward_pre_hooks for block in model.model.diffusion_model.modules())


def test_minimax_h3_goes_through_raylights_inner_attention(monkeypatch, inner_attention):
    minimax = pytest.importorskip("comfy.ldm.minimax.model")
    case = family_case("MiniMax H3")
    model = load(case)
    dense = sample(case, model)
    original = minimax.optimized_attention

    def raylight(q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None, **others):
        """Its attention after the exchange, with all heads on one GPU."""
        processor = (transformer_options or {}).get(INNER_KEY)
        if processor is None or not skip_reshape:
            return original(q, k, v, heads, mask, skip_reshape=skip_reshape, transformer_options=transformer_options,
                            **others)

        q, k, v = (x if isinstance(x, torch.Tensor) else x.take() for x in (q, k, v))

        def inner(q, k, v, **keywords):
            out = original(*(x.transpose(1, 2) for x in (q, k, v)), heads, skip_reshape=True)
            return out.unflatten(-1, (heads, -1))

        return processor(inner, *(x.transpose(1, 2) for x in (q, k, v)), transformer_options=transformer_options,
                         causal=False).flatten(2)

    monkeypatch.setattr(minimax, "optimized_attention", raylight)
    lite = worker.apply(model, {**SETTINGS, "rule": ("Threshold", -30.0)}, ULYSSES)
    assert isinstance(lite.model_options["transformer_options"][INNER_KEY], doors.InnerAttention)
    out = sample(case, lite)
    run = from_plain(worker.last_run(lite)[1])
    assert run.sparse_calls == len(case.layers) * run.forward_passes and not run.notes
    assert (out - dense).abs().max() < 1e-3 * dense.abs().max()
    off = worker.apply(lite, None, ULYSSES)
    assert INNER_KEY not in off.model_options["transformer_options"] and torch.equal(sample(case, off), dense)
