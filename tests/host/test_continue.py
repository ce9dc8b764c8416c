"""Split runs: the second sampler goes on with the masks of the first."""

import gc
import sys
import types
import weakref

import comfy.samplers
import pytest
import torch
from host_kit import LAYERS

from liteattention.host import continues
from liteattention.nodes.apply import LiteAttention
from liteattention.runtime import RunHandle, kept


def split(kit, first, second, steps=8, half=4, cfg=(2.0, 2.0), size=None):
    """KSamplerAdvanced 0..half with one model, then half..end with the other; the final latent."""
    from nodes import KSamplerAdvanced

    latent = {"samples": kit.latent() if size is None else kit.latent(size=size)}
    with torch.inference_mode():
        middle, = KSamplerAdvanced().sample(first, "enable", 1, steps, cfg[0], "euler", "simple", kit.positive,
                                            kit.negative, latent, 0, half, "enable")
        last, = KSamplerAdvanced().sample(second, "disable", 1, steps, cfg[1], "euler", "simple", kit.positive,
                                          kit.negative, middle, half, steps, "disable")
    return last["samples"]


def linked(kit, **settings):
    """(first model, second model, their handles) with `continue_from` between them."""
    handles = RunHandle(), RunHandle()
    first = kit.lite(handle=handles[0], **settings)
    return first, kit.lite(handle=handles[1], continue_from=handles[0], **settings), handles


def test_the_second_half_skips_from_its_first_step(kit, sessions):
    handles = RunHandle(), RunHandle()
    apart = split(kit, kit.lite(handle=handles[0]), kit.lite(handle=handles[1]))
    unlinked = [handle.receipt for handle in handles]
    first, second, handles = linked(kit)
    out = split(kit, first, second)
    before, after = (handle.receipt for handle in handles)
    assert before.skipped_per_step == unlinked[0].skipped_per_step, "the first run is what it would be alone"
    assert unlinked[1].skipped_per_step[0] == 0 < before.skipped_per_step[-1] <= after.skipped_per_step[0]
    assert before.kept_bytes > 0 == unlinked[0].kept_bytes and not after.notes
    assert after.taken == 4 * LAYERS and "continue the run before" in after.text()
    assert set(sessions[-1].passes.values()) == {8} and len(sessions[-1].passes) == 2 * LAYERS
    assert torch.isfinite(out).all() and not torch.equal(out, apart)


def test_two_and_two_steps_skip_in_all_but_the_first(kit):
    first, second, handles = linked(kit)
    split(kit, first, second, 4, 2)
    shares = [share for handle in handles for share in handle.receipt.skipped_per_step]
    assert shares[0] == 0 and all(share > 0 for share in shares[1:]) and len(shares) == 4


def test_a_run_of_its_own_is_what_it_was(kit):
    """A handle that nothing continues, and one whose masks nobody takes, change no bit of a run."""
    alone = kit.sample(kit.lite())
    handle = RunHandle()
    handle.wanted = True
    assert torch.equal(kit.sample(kit.lite(handle=handle)), alone) and handle.kept_bytes > 0


def test_two_networks_with_the_same_layers(kit, model_folder, sessions):
    """Wan 2.2: another network with the same layers; here the same file, loaded a second time."""
    from host_kit import Kit

    other = Kit(model_folder)
    handles = RunHandle(), RunHandle()
    split(kit, kit.lite(handle=handles[0]), other.lite(handle=handles[1], continue_from=handles[0]))
    models = [{key.model for key, _ in s.passes} for s in sessions]
    assert models[0].isdisjoint(models[1]) and handles[1].receipt.skipped_per_step[0] > 0
    assert set(sessions[1].passes.values()) == {8}


def test_memory_is_free_after_the_second_run_and_with_the_handle(kit):
    first, second, handles = linked(kit)
    kit.sample(first)
    words = [weakref.ref(k.mask.words) for entries in handles[0]._kept._kept.values() for k in entries]
    assert len(words) == 2 * LAYERS and all(w().device.type == "cpu" for w in words)
    kit.sample(second)
    gc.collect()
    assert all(w() is None for w in words) and handles[0].kept_bytes == handles[1].kept_bytes == 0

    first, _, handles = linked(kit)
    kit.sample(first)
    words = [weakref.ref(k.mask.words) for entries in handles[0]._kept._kept.values() for k in entries]
    del handles, first, _
    gc.collect()
    assert all(w() is None for w in words), "nothing else holds them"


@pytest.mark.parametrize("cut", ["interrupt", "kernel"])
def test_a_first_run_that_fails_leaves_nothing_to_continue(kit, monkeypatch, cut):
    from liteattention.runtime import evaluation

    first, second, handles = linked(kit)

    def interrupt(*args):
        raise comfy.model_management.InterruptProcessingException()

    def failing(*args, **kwargs):
        raise RuntimeError("no kernel image")

    if cut == "interrupt":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            kit.sample(first, callback=interrupt)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "lite_attention", failing)
            kit.sample(first)
    alone = kit.sample(kit.lite())
    assert torch.equal(kit.sample(second), alone), "a run of its own"
    reason = kept.NOT_FINISHED if cut == "interrupt" else kept.LOST
    assert f"starting fresh: {reason}" in handles[1].receipt.text()


def test_another_resolution_starts_fresh_with_a_note(kit):
    first, second, handles = linked(kit)
    kit.sample(first)
    size = (5, 20, 20)
    alone = kit.sample(kit.lite(), size=size)
    assert torch.equal(kit.sample(second, size=size), alone)
    note, = handles[1].receipt.notes
    assert "700 tokens" in note and "500 tokens" in note and "starting fresh" in note


def test_a_prompt_that_the_first_run_did_not_have_warms_up(kit, sessions):
    first, second, handles = linked(kit)
    out = split(kit, first, second, cfg=(1.0, 2.0))
    ages = {row: {age for (_, r), age in sessions[1].passes.items() if r == row} for _, row in sessions[1].passes}
    assert sorted(ages.values(), key=min) == [{4}, {8}] and torch.isfinite(out).all()
    assert handles[1].receipt.skipped_per_step[0] > 0 and kept.NO_MATCH in handles[1].receipt.text()


@pytest.fixture
def server(monkeypatch):
    """A server that executes a prompt: `server(identity, graph)`."""
    def executing(identity, graph):
        queue = types.SimpleNamespace(currently_running={0: (0, identity, graph, {}, [])})
        instance = types.SimpleNamespace(prompt_queue=queue, send_progress_text=lambda *args: None)
        monkeypatch.setitem(sys.modules, "server",
                            types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance)))
    return executing


GRAPH = {"1": {"class_type": "LiteAttention", "inputs": {"model": ["9", 0], "threshold": -10}},
         "2": {"class_type": "LiteAttention", "inputs": {"model": ["9", 0], "continue_from": ["1", 1]}}}


def unlinked():
    return {"1": GRAPH["1"], "2": {"class_type": "LiteAttention", "inputs": {"model": ["1", 0]}}}


def test_a_first_run_out_of_the_cache_is_no_run_of_this_prompt(kit, server):
    handle, receipts = RunHandle(), RunHandle()
    first = kit.lite(handle=handle, node_id="1")
    second = kit.lite(handle=receipts, node_id="2", continue_from=handle)
    server("one", GRAPH)
    kit.sample(first)
    kit.sample(second)
    assert receipts.receipt.skipped_per_step[0] > 0 and not receipts.receipt.notes
    server("two", GRAPH)  # ComfyUI answers the first sampler from its cache
    alone = kit.sample(kit.lite())
    assert torch.equal(kit.sample(second), alone) and receipts.receipt.notes == [f"starting fresh: {kept.NO_RUN}"]
    kit.sample(first)
    server("three", GRAPH)  # the second sampler of prompt two did not run
    assert handle.kept_bytes > 0 and torch.equal(kit.sample(second), alone) and handle.kept_bytes == 0


def test_the_graph_of_this_very_prompt_decides_what_is_kept(kit, server):
    """A node from the cache has last run in another graph."""
    handle = RunHandle()
    first = kit.lite(handle=handle, node_id="1")
    server("one", unlinked())
    kit.sample(first)
    assert handle.kept_bytes == 0
    server("two", GRAPH)
    kit.sample(first)
    assert handle.kept_bytes > 0
    handle.wanted = True
    server("three", unlinked())
    kit.sample(first)
    assert handle.kept_bytes == 0


def test_without_a_server_the_node_says_what_it_saw(kit, monkeypatch):
    for graph, wanted in ((GRAPH, True), (unlinked(), False), (None, False)):
        hidden = types.SimpleNamespace(unique_id="1", prompt=graph)
        monkeypatch.setattr(LiteAttention, "hidden", hidden)
        model, handle = LiteAttention.execute(kit.model, -1.0, 1, min_tokens=128).args
        assert handle.wanted is wanted
    _, other = LiteAttention.execute(kit.model, -1.0, 1, min_tokens=128, continue_from=handle).args
    assert handle.wanted and not other.wanted


@pytest.mark.parametrize("graph, expected", [
    (GRAPH, True),
    (unlinked(), False),
    (None, None),
    ({"5": {"inputs": {}}}, None),
    # A switch in between, and one that leads elsewhere.
    ({**unlinked(), "3": {"inputs": {"any": ["1", 1]}}, "4": {"inputs": {"continue_from": ["3", 0]}}}, True),
    ({**unlinked(), "3": {"inputs": {"any": ["1", 1]}}, "4": {"inputs": {"text": ["3", 0]}}}, False),
    # The model output of the first node reaches the second by way of a run that is another node's.
    ({"1": {"inputs": {}}, "3": {"inputs": {"model": ["1", 0]}}, "4": {"inputs": {"continue_from": ["3", 1]}}}, False),
    ({"1": {"inputs": {"values": [1, 2], "odd": [["1", 1], 1]}}}, False),
], ids=["linked", "unlinked", "no graph", "not in it", "switch", "elsewhere", "another's run", "lists"])
def test_who_continues_a_run(graph, expected):
    assert continues(graph, "1") is expected
