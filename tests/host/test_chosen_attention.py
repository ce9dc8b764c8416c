"""Checkpoints that choose the attention of their layers: dense calls are computed by it, as without the node."""

import sys
import types
import weakref

import comfy.ldm.modules.attention as attention
import newer_core
import pytest
import torch
from family_cases import case
from family_kit import MIN_TOKENS, load, sample
from host_kit import LAYERS, dense_calls
from interop_kit import SMALL, without_options

from liteattention.host import attach, chosen_attention
from liteattention.host.attach import apply_model
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold

pytestmark = pytest.mark.skipif(not newer_core.supported(), reason="this ComfyUI has no containers")
STEPS = 4


@pytest.fixture(autouse=True)
def newer(monkeypatch):
    if not hasattr(attention, "ComfyAttention"):
        newer_core.install(monkeypatch)


@pytest.fixture
def checkpoint(kit):
    """(the tiny model whose layers choose an attention, a list that gets each of its calls)."""
    calls = []
    network = kit.model.get_model_object("diffusion_model")
    newer_core.choose(network, newer_core.rounding(calls))
    yield kit.model, calls
    newer_core.forget(network)


def test_dense_calls_are_those_of_the_checkpoint_cross_attention_included(kit, checkpoint):
    model, calls = checkpoint
    plain = kit.sample(model, STEPS)
    assert len(calls) == 2 * STEPS * LAYERS
    for settings in ({"dense_blocks": "0--1"}, {"min_tokens": 100_000}):
        calls.clear()
        handle = RunHandle()
        assert torch.equal(kit.sample(kit.lite(model, handle, **settings), STEPS), plain)
        assert len(calls) == 2 * STEPS * LAYERS
        assert "attention_rounding of newer_core, which the checkpoint has chosen" == handle.summary.fallback
        assert "(dense by " in handle.summary.text()
    calls.clear()
    handle = RunHandle()
    kit.sample(kit.lite(model, handle), STEPS)
    assert calls == [False] * STEPS * LAYERS and handle.summary.sparse_calls == STEPS * LAYERS
    assert "against attention_rounding" in handle.summary.break_evens[0]["shape"]
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.get_model_object("diffusion_model").modules()), "nothing stays on the model"


def test_some_layers_may_choose_and_others_not(kit, checkpoint):
    model, calls = checkpoint
    for block in model.get_model_object("diffusion_model").blocks[1:]:
        block.cross_attn.comfy_attention.function = None
    plain = kit.sample(model, STEPS)
    calls.clear()
    handle = RunHandle()
    assert torch.equal(kit.sample(kit.lite(model, handle, dense_blocks="0--1"), STEPS), plain)
    assert len(calls) == (LAYERS + 1) * STEPS
    first, second = handle.summary.fallback.split(" and ")
    assert "checkpoint" in first and "checkpoint" not in second


def test_an_override_found_on_the_model_computes_the_dense_calls_as_without_the_node(kit, checkpoint):
    model, calls = checkpoint
    base, below = kit.watched(model)
    plain = kit.sample(base, STEPS)
    assert torch.equal(kit.sample(kit.lite(base, dense_blocks="0--1"), STEPS), plain)
    assert len(below) == 4 * STEPS * LAYERS and not calls


def test_an_override_on_top_displaces_the_choice_as_it_does_without_the_node(kit, checkpoint):
    model, calls = checkpoint
    below = kit.lite(model, dense_blocks="0--1")
    lite = below.model_options["transformer_options"][newer_core.OVERRIDE]

    def on_top(func, *args, **kwargs):
        return lite(func, *args, **kwargs)

    below.model_options["transformer_options"][newer_core.OVERRIDE] = on_top
    without = model.clone()
    without.model_options["transformer_options"][newer_core.OVERRIDE] = lambda func, *args, **kw: func(*args, **kw)
    assert torch.equal(kit.sample(below, STEPS), kit.sample(without, STEPS)) and not calls


def test_outside_a_sampling_run_the_choice_holds_too(kit, checkpoint):
    """A model that something else than a sampler calls."""
    model, calls = checkpoint
    network = model.get_model_object("diffusion_model")
    options = kit.lite(model).model_options["transformer_options"]
    x = torch.randn(1, 64, 256)

    def executor(x, t, c_concat, c_crossattn, control, transformer_options):
        layer = network.blocks[0].self_attn
        layer.comfy_attention.function(x, x, x, 2)
        assert chosen_attention.current(transformer_options) is None, "no layer is computing"
        return layer(x, torch.zeros(1, 64, 1, 64, 2, 2), transformer_options=transformer_options)

    executor.class_obj = types.SimpleNamespace(diffusion_model=network)
    with torch.inference_mode():
        apply_model(executor, x, None, transformer_options=options)
    assert calls == [True, True]


def test_a_forward_that_calls_its_blocks_without_options_keeps_the_choice(kit, checkpoint):
    """TeaCache: the pack supplies the options, and with them the choice."""
    model, calls = checkpoint
    model = without_options(model)
    handle = RunHandle()
    kit.sample(kit.lite(model, handle, dense_blocks="0--1"), STEPS)
    assert len(calls) == 2 * STEPS * LAYERS and "checkpoint" in handle.summary.fallback


@pytest.mark.parametrize("name", ["Wan T2V", "Wan I2V", "MiniMax H3", "LTXV", "LTX-2", "HunyuanVideo", "Flux"])
def test_families_keep_their_choice_and_their_bytes(name):
    tiny = case(name)
    model, calls = load(tiny), []
    newer_core.choose(model.model.diffusion_model, newer_core.rounding(calls))
    plain, made = sample(tiny, model), len(calls)
    assert made
    calls.clear()
    config = LiteAttentionConfig(rule=Threshold(0.0), min_tokens=MIN_TOKENS, dense_blocks="0--1")
    assert torch.equal(sample(tiny, attach(model, config)), plain) and len(calls) == made


def test_containers_give_the_bytes_of_plain_tensors(kit, monkeypatch):
    """Sparse calls, dense calls and the model without the node."""
    def runs():
        return [kit.sample(model, STEPS) for model in (kit.model, kit.lite(), kit.lite(dense_blocks="1"))]

    contained = runs()
    monkeypatch.undo()
    assert all(map(torch.equal, contained, runs()))


def test_nobody_else_holds_what_the_chosen_attention_takes(kit, checkpoint):
    """It can free q before it allocates anything. (In a cross-attention the network of 0.33 itself holds q.)"""
    model, _ = checkpoint
    freed = []

    def from_containers(q, k, v, heads, **kwargs):
        self_attention, taken = q.peek().shape == k.peek().shape, q.take()
        alive, copy = weakref.ref(taken), taken.clone()
        del taken
        if self_attention:
            freed.append(alive() is None)
        return attention.attention_pytorch.__wrapped__(copy, k.take(), v.take(), heads, **kwargs)

    newer_core.choose(model.get_model_object("diffusion_model"), newer_core.wrapped(from_containers, from_containers))
    kit.sample(kit.lite(model, dense_blocks="0--1"), STEPS)
    assert freed == [True] * STEPS * LAYERS


def test_a_named_attention_answers_for_itself(kit):
    """The model calls a certain attention and not the one that ComfyUI has chosen."""
    override = kit.lite().model_options["transformer_options"][newer_core.OVERRIDE]
    q, k, v = (torch.randn(1, 64, 128) for _ in range(3))
    asked = []

    @newer_core.wrapped
    def named(q, k, v, heads, **kwargs):
        asked.append(q.shape)
        return q + 1

    contained = [attention.AttentionTensorContainer(x) for x in (q, k, v)]
    assert torch.equal(named(*contained, 2, transformer_options={newer_core.OVERRIDE: override}), q + 1) and asked
    assert all(container.tensor is None for container in contained)


def test_a_kernel_that_fails_on_containers_leaves_them_to_the_dense_attention(kit, checkpoint, monkeypatch):
    model, _ = checkpoint
    monkeypatch.setattr(sys.modules["liteattention.runtime.compute"], "lite_attention",
                        lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("a bug")))
    handle = RunHandle()
    plain = kit.sample(model, STEPS)
    assert torch.equal(kit.sample(kit.lite(model, handle), STEPS), plain)
    assert dense_calls(handle.summary)["the kernel failed in this run"] == STEPS * LAYERS


def test_compiled_blocks_do_without_the_choice(kit, checkpoint):
    """Hooks are not traced: dense calls are computed by ComfyUI's attention there, sparse ones as ever."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model, calls = checkpoint
    handle = RunHandle()
    compiled = kit.lite(model, handle)
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict},
                              keys=["diffusion_model.blocks.0"])
    with torch._dynamo.config.patch(recompile_limit=64):
        out = kit.sample(compiled, 3, size=SMALL)
    torch._dynamo.reset()
    assert torch.isfinite(out).all() and handle.summary.sparse_calls == 3 * LAYERS and not handle.summary.notes
    assert calls.count(False) == 3 * (LAYERS - 1), "all but the compiled block"
