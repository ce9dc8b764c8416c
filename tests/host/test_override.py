"""The attention override driven directly: arguments, layouts, threads, memory, the options of a guider."""

import sys
import threading
import types
from contextlib import contextmanager

import pytest
import torch
from host_kit import LAYERS

from liteattention.host import model_call
from liteattention.runtime import LayerId, LiteAttentionConfig, RunHandle, SamplingRun, Threshold
from liteattention.runtime.reasons import NO_LAYER

module = sys.modules["liteattention.host.attach"]
N, HEADS, D = 384, 2, 64


def tensors(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, N, HEADS, D, generator=generator) for _ in range(3))
    q[..., 0] += 8
    k[..., 0] += torch.tensor([8.0, 0.0, 5.0])[torch.arange(N) // 128].view(1, N, 1)
    return q, k, v


class Backend:
    """Stands for ComfyUI's attention function: remembers its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return "fallback"


def options(run, owner, rows=2, **extra):
    forward_pass = run.forward_pass(model="m", rows=[("uuid", i, 0) for i in range(rows)], video_tokens=N)
    return {module.FORWARD_KEY: (owner, run, forward_pass), "block_index": 0, "block_type": "double", "total_blocks": 5,
            **extra}


@pytest.fixture
def driven():
    owner = object()
    run = SamplingRun(LiteAttentionConfig(rule=Threshold(-2.0), min_tokens=128, warmup_steps=0), 4)
    yield module.make_override(None, owner), run, owner
    run.close()


def test_everything_is_passed_on_when_a_call_is_dense(driven):
    """Dropping `_inside_attn_wrapper` would let a wrapped function come back to the override without end."""
    override, run, owner = driven
    q, k, v = (x.flatten(2) for x in tensors())
    mask = torch.zeros(N, N)
    backend = Backend()
    given = {"_inside_attn_wrapper": True, "low_precision_attention": False, "scale": 0.5, "enable_gqa": True,
             "unknown_name": 1, "transformer_options": options(run, owner)}
    assert override(backend, q, k, v, HEADS, mask, attn_precision="p", skip_reshape=False, skip_output_reshape=True,
                    **given) == "fallback"
    (args, kwargs), = backend.calls
    assert args == (q, k, v, HEADS)
    assert kwargs == {**given, "mask": mask, "attn_precision": "p", "skip_reshape": False,
                      "skip_output_reshape": True}


def test_a_wrapped_backend_does_not_come_back_to_the_override(driven):
    from comfy.ldm.modules.attention import optimized_attention

    override, run, owner = driven
    q, k, v = (x.flatten(2) for x in tensors())
    entered = []

    def fallback(func, *args, **kwargs):
        entered.append(1)
        return optimized_attention(*args, **kwargs)

    override_on_top = module.make_override(fallback, owner)
    chosen = options(run, owner, rows=3)
    chosen["optimized_attention_override"] = override_on_top
    out = optimized_attention(q, k, v, heads=HEADS, transformer_options=chosen)
    assert out.shape == q.shape and entered == [1]


@pytest.mark.parametrize("skip_reshape", [False, True, "fused"])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_layouts_and_scale_give_what_comfyuis_own_attention_gives(driven, skip_reshape, skip_output_reshape, scale):
    from comfy.ldm.modules.attention import attention_basic

    override, run, owner = driven
    split = [x.transpose(1, 2) for x in tensors()]
    if skip_reshape == "fused":
        # Views into the output of one projection, as MiniMax H3 has them: rows lie three times as far apart.
        split = [x.transpose(1, 2) for x in torch.stack(tensors(), 2).unbind(2)]
        assert split[0].stride() == (N * 3 * HEADS * D, D, 3 * HEADS * D, 1)
        skip_reshape = True
    inputs = split if skip_reshape else [x.transpose(1, 2).flatten(2) for x in split]
    keywords = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    out = override(Backend(), *inputs, HEADS, scale=scale, transformer_options=options(run, owner), **keywords)
    expected = torch.nn.functional.scaled_dot_product_attention(*split, scale=scale)
    if not skip_output_reshape:
        expected = expected.transpose(1, 2).flatten(2)
    assert out.shape == expected.shape and (out - expected).abs().max() < 1e-4
    theirs = attention_basic(*inputs, HEADS, **keywords)
    assert theirs.shape == out.shape
    assert run.counters.sparse == 1


def test_calls_without_a_block_number_are_dense(driven):
    override, run, owner = driven
    q, k, v = (x.flatten(2) for x in tensors())
    for extra in ({"block_index": None}, {"block_index": "0"}):
        assert override(Backend(), q, k, v, HEADS, transformer_options=options(run, owner, **extra)) == "fallback"
    assert run.counters.dense == {NO_LAYER: 2}


def test_calls_outside_a_run_or_of_another_patch_are_dense(driven):
    override, run, _ = driven
    q, k, v = (x.flatten(2) for x in tensors())
    for given in ({}, {"transformer_options": None}, {"transformer_options": options(run, object())}):
        assert override(Backend(), q, k, v, HEADS, **given) == "fallback"


def test_the_override_is_a_function_and_its_state_an_object(kit):
    """Dicts inside transformer_options are copied at every call, callable objects (up to 0.18) at every clone."""
    model = kit.lite()
    override = model.model_options["transformer_options"]["optimized_attention_override"]
    assert isinstance(override, types.FunctionType)
    again = model.clone().clone()
    assert again.model_options["transformer_options"]["optimized_attention_override"] is override


def test_masks_made_under_inference_mode_are_updated_by_a_worker_thread(driven):
    """ComfyUI's nodes run under inference mode, its multi-GPU workers only under no_grad."""
    override, run, owner = driven
    inputs = [x.flatten(2) for x in tensors()]
    with torch.inference_mode():
        override(Backend(), *inputs, HEADS, transformer_options=options(run, owner))
    results = []

    def work():
        with torch.no_grad():
            results.append(override(Backend(), *inputs, HEADS, transformer_options=options(run, owner)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.is_tensor(results[0]) and not run.sparse.failed, run.close().notes
    assert {m.passes[0] for rows in run.masks.all_masks().values() for m in rows.values()} == {2}


def test_threads_with_rows_of_their_own_share_a_run(driven):
    """Conditionings computed at the same time by several workers."""
    override, run, owner = driven
    alone = SamplingRun(run.config, 4)
    expected = {}
    for row in range(4):
        held = alone.forward_pass(model="m", rows=[("uuid", row, 0)], video_tokens=N)
        for _ in range(3):
            expected[row] = override(Backend(), *(x.flatten(2) for x in tensors(1, row)), HEADS, transformer_options={
                module.FORWARD_KEY: (owner, alone, held), "block_index": 0})
            held = alone.forward_pass(model="m", rows=[("uuid", row, 0)], video_tokens=N)
    results, barrier = {}, threading.Barrier(4)

    def work(row):
        barrier.wait()
        for _ in range(3):
            held = run.forward_pass(model="m", rows=[("uuid", row, 0)], video_tokens=N)
            results[row] = override(Backend(), *(x.flatten(2) for x in tensors(1, row)), HEADS, transformer_options={
                module.FORWARD_KEY: (owner, run, held), "block_index": 0})

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[row], expected[row]) for row in range(4))
    assert run.counters.sparse == 12
    alone.close()


def lasting_tensors(run):
    """Everything that a run keeps from one call to the next, by what it is."""
    for rows in run.masks.all_masks().values():
        for mask in rows.values():
            yield "mask", mask.words
    for workspace in run.sparse._workspaces.values():
        yield from workspace._buffers.items()
        for table in workspace._tables.values():
            yield "table", table
    for blocks in run.counters._counters.values():
        yield from (("counter", block) for block in blocks)


def test_lasting_allocations_happen_while_comfyuis_recorder_is_paused(kit, runs, monkeypatch):
    """From 0.34 on a block's allocations may be recorded; what outlives the block must not be among them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    allocated, kept, calls = set(), {}, []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                allocated.add(out.untyped_storage().data_ptr())
            return out

    @contextmanager
    def pause():
        calls.append(1)
        with Allocations():
            yield

    def look(step, *args):
        kept.update(((step, name, i), tensor.untyped_storage().data_ptr())
                    for i, (name, tensor) in enumerate(lasting_tensors(runs[0])))

    prefetch = types.ModuleType("comfy.model_prefetch")
    try:
        import comfy.model_prefetch as prefetch
    except ImportError:
        import comfy

        monkeypatch.setitem(sys.modules, "comfy.model_prefetch", prefetch)
        monkeypatch.setattr(comfy, "model_prefetch", prefetch, raising=False)
    monkeypatch.setattr(prefetch, "pause_malloc_graph", pause, raising=False)
    # A latent that claims to be shorter has tables of tiles to keep.
    tokens = module.model_call.latent_tokens
    monkeypatch.setattr(module.model_call, "latent_tokens", lambda *args: tokens(*args) - 100)
    kit.sample(kit.lite(), callback=look)
    assert len(calls) >= 2 * LAYERS and {"mask", "counter"} <= {name for _, name, _ in kept}
    assert {name for (_, name, _), storage in kept.items() if storage not in allocated} == set()


@pytest.mark.parametrize("error", [None, RuntimeError("in the run")])
def test_a_guider_gets_its_options_back(error):
    """Also one that calls outer_sample itself: core's own `sample` would hide a leak."""
    original = {"transformer_options": {"kept": 1}}
    guider = types.SimpleNamespace(model_options=original,
                                   model_patcher=types.SimpleNamespace(load_device=torch.device("cpu")))
    seen = []

    def executor(*args, **kwargs):
        seen.append((guider.model_options["transformer_options"], args[5], kwargs))
        if error is not None:
            raise error
        return "latent"

    executor.class_obj = guider
    wrapper = module.make_run_wrapper(LiteAttentionConfig(), object(), None, RunHandle())
    arguments = {"callback": lambda *args: args, "latent_shapes": [1]}
    if error is None:
        assert wrapper(executor, "noise", "latent", "sampler", torch.ones(5), **arguments) == "latent"
    else:
        with pytest.raises(RuntimeError):
            wrapper(executor, "noise", "latent", "sampler", torch.ones(5), **arguments)
    assert guider.model_options is original and original == {"transformer_options": {"kept": 1}}
    inside, callback, kwargs = seen[0]
    assert inside["kept"] == 1 and module.KEY in inside and kwargs == {"latent_shapes": [1]}
    assert callback(0, "x0", "x", 4) == (0, "x0", "x", 4), "a callback given by keyword is wrapped as well"


@pytest.mark.parametrize("shape, patch, modalities, tokens", [
    ((1, 16, 9, 32, 32), (1, 2, 2), 1, 2304),
    ((1, 16, 9, 33, 32), (1, 2, 2), 1, 9 * 17 * 16),
    ((1, 16, 21, 90, 160), [1, 2, 2], 1, 75600),
    ((2, 16, 128, 128), 2, 1, 4096),
    ((2, 16, 5, 128, 128), 2, 1, 5 * 4096),
    ((1, 16, 9, 32, 32), None, 1, None),
    ((1, 16, 9, 32, 32), (1, 2, 2), 2, None),
    ((1, 1, 5000), (1, 2, 2), 1, None),
])
def test_tokens_of_a_latent(shape, patch, modalities, tokens):
    assert model_call.latent_tokens(shape, patch, modalities) == tokens


def test_layer_and_row_names():
    named = {"block_index": 3, "block_type": "single", "total_blocks": 9}
    assert model_call.layer_id(named) == LayerId("single", 3, 9)
    assert model_call.layer_id({"block_index": 3}) == LayerId("block", 3, None)
    assert model_call.layer_id({}) is None
    assert str(LayerId("single", 0)) != str(LayerId("double", 0)), "both stacks count from 0"
    rows = model_call.row_names({"uuids": ["n", "p"], "cond_or_uncond": [1, 0]}, 4)
    assert rows == [("n", 1, 0), ("n", 1, 1), ("p", 0, 0), ("p", 0, 1)]
    assert model_call.row_names({"uuids": ["n", "p"], "cond_or_uncond": [1, 0]}, 3) is None
    assert model_call.row_names({"cond_or_uncond": [1, 0]}, 2) is None


@pytest.mark.parametrize("known", [True, False])
def test_sequences_longer_than_the_latent_keep_what_is_not_the_video(kit, runs, monkeypatch, known):
    """Reference frames, text: N is not F x H x W. Simulated by a latent that claims 100 tokens less. Of Wan, without a
    frame in front, the end is kept; of a model of no family both ends."""
    original = module.model_call.latent_tokens
    monkeypatch.setattr(module.model_call, "latent_tokens", lambda *args: original(*args) - 100)
    if not known:
        monkeypatch.setattr(module.families, "FAMILIES", {})
    kit.sample(kit.lite(rule=Threshold(-0.5)), steps=6)
    kept, first = 0, True
    for bits in runs[0].bits.values():
        assert bits[..., -1].all() and bits[..., -1, :].all()
        first &= bool(bits[..., 0].all() and bits[..., 0, :].all())
        kept += bits.sum().item() / bits.numel()
    assert first is not known and kept < len(runs[0].bits)
