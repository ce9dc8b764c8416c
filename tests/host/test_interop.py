"""Other nodes that work on the attention of the model: backends, sparse attention, KJNodes' patches, torch.compile."""

import importlib.util
import inspect
import os
import re
import sys
import types
from pathlib import Path

import comfy.ldm.modules.attention as core_attention
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from host_kit import LAYERS, dense_calls
from interop_kit import ORDERS, SMALL, STEPS, check_dense_runs, in_order, node, plain, rows_of, without_options
from safetensors.torch import load_file

from liteattention.runtime import RunHandle
from liteattention.runtime.reasons import SPARSE_ON_TOP

OVERRIDE = "optimized_attention_override"
COMPILER = os.environ.get("LITEATTENTION_TEST_COMPILER", "aot_eager")
"""Backend of TorchCompileModel here; "inductor", the node's own, compiles for half a minute to minutes."""
CALLS = STEPS * LAYERS
"""Self-attentions of a run, and as many cross-attentions."""


def pytorch_backend(model):
    return node("comfy_extras.nodes_model_advanced", "ModelAttentionBackend")().patch(model, "pytorch attention")[0]


def test_model_attention_backend_before_computes_the_dense_calls(kit, monkeypatch):
    served = []
    original = core_attention.get_attention_function("pytorch")

    def counted(*args, **kwargs):
        served.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "pytorch", counted)
    check_dense_runs(kit, "other node first", pytorch_backend)
    handle, seen = RunHandle(), len(served)
    kit.sample(in_order(kit, "other node first", pytorch_backend, handle), STEPS, size=SMALL)
    assert handle.summary.sparse_calls == CALLS == len(served) - seen
    assert dense_calls(handle.summary) == {"cross-attention": CALLS}


def test_model_attention_backend_after_replaces_the_attention_and_the_summary_says_so(kit):
    handle = RunHandle()
    out = kit.sample(in_order(kit, "other node last", pytorch_backend, handle), STEPS, size=SMALL)
    assert torch.equal(out, kit.sample(pytorch_backend(kit.model), STEPS, size=SMALL))
    assert handle.summary.sparse_calls == 0 and "put LiteAttention last" in handle.summary.text()


def like_core_sparse(entered):
    """Acts on a model as core's node does: an override in front of what it finds, put in front again whenever another
    one is there; every call is dense, as with the node on a CPU."""
    if "model_options" not in inspect.signature(ModelPatcher.prepare_state).parameters:
        pytest.skip("this ComfyUI hands no options to ON_PREPARE_STATE, so it cannot have such a node")

    def apply(model):
        installed = set()

        def install(options):
            previous = options.get(OVERRIDE)
            if previous in installed:
                return

            def override(func, *args, **kwargs):
                entered.append(1)
                return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

            override.__module__ = "comfy_extras.nodes_sparse_attention"
            installed.add(override)
            options[OVERRIDE] = override

        patched = model.clone()
        install(patched.model_options["transformer_options"])
        patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "block_sparse_attention",
                                      lambda patcher, timestep, options: install(options["transformer_options"]))
        return patched

    return apply


def core_sparse(entered):
    """Core's node itself, where this ComfyUI has it (it is younger than 0.33)."""
    nodes = pytest.importorskip("comfy_extras.nodes_sparse_attention", reason="this ComfyUI has no sparse attention",
                                exc_type=ImportError)
    return lambda model: nodes.BlockSparseAttention.execute(model, {"selection": "sol-attn"}, 0.0, 1.0,
                                                            min_tokens=0).args[0]


@pytest.fixture(params=[like_core_sparse, core_sparse], ids=lambda make: make.__name__)
def sparse(request):
    """(model -> model with Model Sparse Attention, a list that gets an entry per call of `like_core_sparse`)."""
    entered = []
    return request.param(entered), entered


def overwritten(model):
    """A node that puts its own override in place of the one that is there, as Sage patches do."""
    patched = model.clone()
    patched.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: func(*args, **kwargs)
    return patched


def test_model_sparse_attention_before_is_refused(kit, sparse):
    add_sparse, _ = sparse
    for model in (add_sparse(kit.model), overwritten(add_sparse(kit.model)), add_sparse(kit.lite())):
        with pytest.raises(ValueError, match="already has Model Sparse Attention.*Remove one of the two"):
            kit.lite(model)


@pytest.mark.parametrize("between", [lambda model: model, overwritten], ids=["alone", "a patch in between"])
def test_model_sparse_attention_after_has_the_attention(kit, runs, sparse, between):
    """It is on top at every evaluation, whatever comes between; two such nodes would wrap each other without end."""
    add_sparse, entered = sparse
    handle = RunHandle()
    model = add_sparse(between(kit.lite(handle=handle)))
    for _ in range(2):
        entered.clear()
        assert torch.equal(kit.sample(model, STEPS, size=SMALL), plain(kit))
        assert len(entered) in (0, 2 * CALLS), "the chain does not grow from step to step, nor from run to run"
        assert handle.summary.sparse_calls == 0 and not runs[-1].passes
    text = handle.summary.text()
    if between is overwritten:
        assert "Model Sparse Attention, applied after this node" in text and "Remove one of the two nodes" in text
    else:
        assert dense_calls(handle.summary) == {reason: CALLS for reason in ("cross-attention", SPARSE_ON_TOP.text)}
        assert SPARSE_ON_TOP.text in text and "remove Model Sparse Attention or LiteAttention" in text


def kjnodes_module(monkeypatch, name):
    """A module of KJNodes, from $KJNODES_PATH or ComfyUI's custom_nodes, with a Sage that the tests bring."""
    found = [Path(os.environ["KJNODES_PATH"])] if "KJNODES_PATH" in os.environ else [
        path for folder in folder_paths.get_folder_paths("custom_nodes") for path in Path(folder).glob("*[kK][jJ]*")]
    files = [path / "nodes" / f"{name}.py" for path in found if (path / "nodes" / f"{name}.py").is_file()]
    if not files:
        pytest.skip("KJNodes is neither at $KJNODES_PATH nor in ComfyUI's custom_nodes")
    spec = importlib.util.spec_from_file_location(f"kjnodes_{name}", files[0])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def sage(q, k, v, is_causal=False, attn_mask=None, tensor_layout="NHD"):
    """Stands for the library: a dense attention that rounds as it does, in half precision."""
    q, k, v = (x.transpose(1, 2) if tensor_layout == "NHD" else x for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    return out.transpose(1, 2) if tensor_layout == "NHD" else out


def own_sage_patch(monkeypatch, calls):
    """What such patches do: the override slot, without a look at what is in it, and a function of their own."""
    def patch(model):
        def override(func, q, k, v, heads, *args, **kwargs):
            calls.append(q.shape == k.shape)
            q, k, v = (x.half().view(x.shape[0], -1, heads, x.shape[-1] // heads) for x in (q, k, v))
            return sage(q, k, v).flatten(2).float()

        patched = model.clone()
        patched.model_options["transformer_options"][OVERRIDE] = override
        return patched

    return patch


def kj_sage_patch(monkeypatch, calls):
    """KJNodes' own patch."""
    def counted(q, k, v, **kwargs):
        calls.append(q.shape == k.shape)
        return sage(q, k, v, **kwargs)

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=counted))
    nodes = kjnodes_module(monkeypatch, "model_optimization_nodes")
    return lambda model: nodes.PathchSageAttentionKJ().patch(model, "auto")[0]


@pytest.fixture(params=[own_sage_patch, kj_sage_patch], ids=lambda make: make.__name__)
def sage_patch(request, monkeypatch):
    """(the patch, a list that gets for each call of Sage whether it is a self-attention)."""
    calls = []
    return request.param(monkeypatch, calls), calls


def test_a_sage_patch_before_computes_the_dense_calls(kit, sage_patch):
    patch, calls = sage_patch
    handle = RunHandle()
    check_dense_runs(kit, "other node first", patch, tolerance=0.02)
    calls.clear()
    kit.sample(in_order(kit, "other node first", patch, handle), STEPS, size=SMALL)
    assert calls == [False] * CALLS == [False] * dense_calls(handle.summary)["cross-attention"]
    assert handle.summary.sparse_calls == CALLS and handle.summary.skipped > 0


def test_a_sage_patch_after_replaces_the_attention_and_the_summary_says_so(kit, sage_patch):
    patch, calls = sage_patch
    handle = RunHandle()
    out = kit.sample(in_order(kit, "other node last", patch, handle), STEPS, size=SMALL)
    assert len(calls) == 2 * CALLS and "put LiteAttention last" in handle.summary.text()
    assert torch.equal(out, kit.sample(patch(kit.model), STEPS, size=SMALL))


@pytest.mark.parametrize("order", ORDERS)
def test_a_patch_of_the_attention_modules_is_named_in_the_summary(kit, order):
    """KJNodes' memory-efficient Sage patch replaces `self_attn.forward`: the hook never sees these calls."""
    def replaced(model):
        patched = model.clone()
        for index, block in enumerate(model.get_model_object("diffusion_model").blocks):
            def forward(self, x, freqs, transformer_options=None):
                b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
                return self.o(sage(*(f(x).view(b, s, n, d) for f in (self.q, self.k, self.v))).flatten(2))
            patched.add_object_patch(f"diffusion_model.blocks.{index}.self_attn.forward",
                                     types.MethodType(forward, block.self_attn))
        return patched

    handle = RunHandle()
    out = kit.sample(in_order(kit, order, replaced, handle), STEPS, size=SMALL)
    assert torch.equal(out, kit.sample(replaced(kit.model), STEPS, size=SMALL))
    assert dense_calls(handle.summary) == {"cross-attention": CALLS} and handle.summary.sparse_calls == 0
    assert f"diffusion_model.blocks.0.self_attn.forward and {LAYERS - 1} more" in handle.summary.text()


@pytest.mark.parametrize("order", ORDERS)
def test_a_forward_that_calls_its_blocks_without_options_is_sparse_all_the_same(kit, order):
    check_dense_runs(kit, order, without_options)
    handle, plain = RunHandle(), RunHandle()
    out = kit.sample(in_order(kit, order, without_options, handle), STEPS, size=SMALL)
    assert handle.summary.sparse_calls == CALLS and dense_calls(handle.summary) == {"cross-attention": CALLS}
    assert torch.equal(out, kit.sample(kit.lite(handle=plain), STEPS, size=SMALL))
    assert handle.summary.layers == plain.summary.layers and handle.summary.skipped > 0
    assert not any(block._forward_pre_hooks for block in kit.model.get_model_object("diffusion_model").blocks)


@pytest.fixture
def dynamo():
    """torch.compile with room for all that these tests compile, and nothing of it afterwards."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def two_blocks(model_folder):
    """The first two blocks of the tiny model: compilers take their time for each."""
    state = load_file(model_folder / "tiny_wan_t2v.safetensors")
    state = {name: weight for name, weight in state.items() if not re.match(r"blocks\.[2-9]\.", name)}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})


@pytest.mark.parametrize("order", ORDERS)
def test_torch_compile_model(kit, runs, dynamo, two_blocks, order):
    """The whole network, with the guards on transformer_options dropped: block numbers must not freeze."""
    compile_node = node("comfy_extras.nodes_torch_compile", "TorchCompileModel")

    def compiled(model):
        return compile_node.execute(model, COMPILER).args[0]

    uncompiled = kit.sample(kit.lite(two_blocks), STEPS, size=SMALL)
    handle = RunHandle()
    model = (kit.lite(compiled(two_blocks), handle) if order == "other node first"
             else compiled(kit.lite(two_blocks, handle)))
    assert (kit.sample(model, STEPS, size=SMALL) - uncompiled).abs().max() < 1e-3
    assert {key.block for key, _ in runs[-1].passes} == {"double 0", "double 1"}
    assert set(runs[-1].passes.values()) == {STEPS} and handle.summary.sparse_calls == 2 * STEPS
    assert dense_calls(handle.summary) == {"cross-attention": 2 * STEPS} and not handle.summary.notes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("by", ["core's helper", "KJNodes"])
def test_compiled_blocks(kit, runs, monkeypatch, dynamo, order, by):
    """KJNodes compiles block by block and resolves the compiled blocks by the network that runs. With KJNodes itself
    the backend is its "inductor", made to compile nothing; tracing and guards are the same."""
    def compiled(model):
        if by == "KJNodes":
            return kj.patch(model, "inductor", False, "default", "false", True, 64, False)[0]
        from comfy_api.torch_helpers import set_torch_compile_wrapper
        from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

        patched = model.clone()
        set_torch_compile_wrapper(model=patched, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict},
                                  keys=[f"diffusion_model.blocks.{index}" for index in range(LAYERS)])
        return patched

    if by == "KJNodes":
        nodes = kjnodes_module(monkeypatch, "model_optimization_nodes")
        kj = nodes.TorchCompileModelAdvanced()
        settings = nodes.build_compile_kwargs
        monkeypatch.setattr(nodes, "build_compile_kwargs", lambda *args: {**settings(*args), "backend": "eager"})
    uncompiled = kit.sample(kit.lite(), STEPS, size=SMALL)
    out = kit.sample(in_order(kit, order, compiled), STEPS, size=SMALL)
    assert (out - uncompiled).abs().max() < 1e-3
    assert {key.block for key, _ in runs[-1].passes} == {f"double {i}" for i in range(LAYERS)}
    assert set(runs[-1].passes.values()) == {STEPS} and len(rows_of(runs[-1])) == 2


@pytest.mark.parametrize("order", ORDERS)
def test_a_compile_node_with_fullgraph_turns_sparse_attention_off(kit, dynamo, order):
    """It would end the render at sparse attention, which breaks the graph."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def compiled(model):
        patched = model.clone()
        set_torch_compile_wrapper(model=patched, backend="eager", fullgraph=True,
                                  options={"guard_filter_fn": skip_torch_compile_dict},
                                  keys=[f"diffusion_model.blocks.{index}" for index in range(LAYERS)])
        return patched

    handle, base = RunHandle(), pytorch_backend(kit.model)
    model = kit.lite(compiled(base), handle) if order == "other node first" else compiled(kit.lite(base, handle))
    alone = kit.sample(compiled(base), STEPS, size=SMALL)
    assert torch.equal(kit.sample(model, STEPS, size=SMALL), alone)
    assert handle.summary.sparse_calls == 0 and "Turn fullgraph off" in handle.summary.text()
    assert handle.summary.steps_done == STEPS
