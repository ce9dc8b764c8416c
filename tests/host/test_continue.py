"""Split runs: the second sampler goes on with the masks of the first."""

import dataclasses
import gc
import sys
import types
import weakref

import comfy.samplers
import pytest
import torch
from family_cases import case, words
from family_kit import MIN_TOKENS, load, sample
from host_kit import LAYERS

from liteattention.host import attach
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold
from liteattention.runtime import run as run_module
from liteattention.runtime.masks import NO_MATCH


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


def test_the_second_half_skips_from_its_first_step(kit, runs):
    handles = RunHandle(), RunHandle()
    apart = split(kit, kit.lite(handle=handles[0]), kit.lite(handle=handles[1]))
    unlinked = [handle.summary for handle in handles]
    first, second, handles = linked(kit)
    out = split(kit, first, second)
    before, after = (handle.summary for handle in handles)
    assert before.skipped_per_step == unlinked[0].skipped_per_step, "the first run is what it would be alone"
    assert unlinked[1].skipped_per_step[0] == 0 < before.skipped_per_step[-1] <= after.skipped_per_step[0]
    assert before.carried_bytes > 0 and not after.notes
    assert after.sparse_calls == 4 * LAYERS and "with the masks of the run before" in after.text()
    assert set(runs[-1].passes.values()) == {8} and len(runs[-1].passes) == 2 * LAYERS
    assert torch.isfinite(out).all() and not torch.equal(out, apart)


def test_two_and_two_steps_skip_in_all_but_the_first(kit):
    first, second, handles = linked(kit)
    split(kit, first, second, 4, 2)
    shares = [share for handle in handles for share in handle.summary.skipped_per_step]
    assert shares[0] == 0 and all(share > 0 for share in shares[1:]) and len(shares) == 4


def test_chains_of_one_step_skip_in_all_but_the_first(kit):
    from nodes import KSamplerAdvanced

    for steps in ((1, 3), (1, 1, 2)):
        handles, latent, done = [], {"samples": kit.latent()}, 0
        models = []
        for _ in steps:
            before = handles[-1] if handles else None
            handles.append(RunHandle())
            models.append(kit.lite(handle=handles[-1], continue_from=before))
        for model, count in zip(models, steps, strict=True):
            with torch.inference_mode():
                latent, = KSamplerAdvanced().sample(
                    model, "enable" if not done else "disable", 1, 4, 2.0, "euler", "simple", kit.positive,
                    kit.negative, latent, done, done + count, "enable")
            done += count
        shares = [share for handle in handles for share in handle.summary.skipped_per_step]
        assert len(shares) == 4 and shares[0] == 0 and all(shares[1:]), steps
        told = handles[0].summary.text()
        assert "records for the run that continues it" in told
        assert "to skip more" not in told and "no step" not in told, "nothing to change"
        assert not any(handle.summary.notes for handle in handles)


def test_a_node_knows_from_the_prompt_that_another_goes_on_with_its_runs(monkeypatch, kit):
    """Also where both were made inside a loop, with ids of their own."""
    from comfy_execution.graph import DynamicPrompt

    from liteattention.nodes.apply import LiteAttention

    def node(link=None):
        return {"class_type": "LiteAttention", "inputs": {"continue_from": link} if link else {"threshold": -10.0}}

    prompt = DynamicPrompt({"1": node(), "2": node(["1", 1]), "3": node()})
    prompt.add_ephemeral_node("12.0.3", node(), "12", "3")
    prompt.add_ephemeral_node("12.0.4", node(["12.0.3", 1]), "12", "4")
    rule = {"rule": "error budget", "error_budget": 0.3}
    for name, continued in (("1", True), ("2", False), ("3", False), ("12.0.3", True), ("12.0.4", False)):
        monkeypatch.setattr(LiteAttention, "hidden", types.SimpleNamespace(unique_id=name, dynprompt=prompt))
        assert LiteAttention.execute(kit.model, rule).result[1].continued == continued, name


def test_a_handle_that_nothing_reads_changes_no_bit_of_a_run(kit):
    alone = kit.sample(kit.lite())
    handle = RunHandle()
    assert torch.equal(kit.sample(kit.lite(handle=handle)), alone) and handle.masks.nbytes > 0


def test_two_networks_with_the_same_layers(kit, model_folder, runs):
    """Wan 2.2: another network with the same layers; here the same file, loaded a second time."""
    from host_kit import Kit

    other = Kit(model_folder)
    handles = RunHandle(), RunHandle()
    split(kit, kit.lite(handle=handles[0]), other.lite(handle=handles[1], continue_from=handles[0]))
    models = [{key.model for key, _ in s.passes} for s in runs]
    assert models[0].isdisjoint(models[1]) and handles[1].summary.skipped_per_step[0] > 0
    assert set(runs[1].passes.values()) == {8}


def test_masks_stay_in_main_memory_until_the_next_run_of_their_node_and_no_longer_than_the_handle(kit):
    first, second, handles = linked(kit)
    kit.sample(first)
    words = [weakref.ref(carried.mask.words) for carried in handles[0].masks]
    assert len(words) == 2 * LAYERS and all(w().device.type == "cpu" for w in words)
    kit.sample(second)
    gc.collect()
    assert all(w() is not None for w in words), "a report, or the second sampler once more, may still read them"
    kit.sample(first)
    gc.collect()
    assert all(w() is None for w in words) and handles[0].masks.nbytes > 0

    words = [weakref.ref(carried.mask.words) for carried in handles[0].masks]
    del handles, first, second
    gc.collect()
    assert all(w() is None for w in words), "nothing else holds them"


@pytest.mark.parametrize("cut", ["interrupt", "kernel"])
def test_a_first_run_that_fails_leaves_nothing_to_continue(kit, monkeypatch, cut):
    from liteattention.runtime import compute

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
            patch.setattr(compute, "lite_attention", failing)
            kit.sample(first)
    alone = kit.sample(kit.lite())
    assert torch.equal(kit.sample(second), alone), "a run of its own"
    reason = run_module.NOT_FINISHED if cut == "interrupt" else run_module.LOST
    assert f"continue_from: {reason}; the masks start anew" in handles[1].summary.text()


@pytest.mark.parametrize("size", [(7, 28, 20), (5, 20, 20)])
def test_another_size_of_the_video_skips_from_its_first_step(kit, size):
    first, second, handles = linked(kit)
    kit.sample(first)
    alone = kit.sample(kit.lite(), size=size)
    out = kit.sample(second, size=size)
    assert torch.isfinite(out).all() and not torch.equal(out, alone)
    summary = handles[1].summary
    assert all(summary.skipped_per_step) and not summary.notes and "with the masks of the run before" in summary.text()


@pytest.mark.parametrize("name, latent, conditions, frames", [
    ("LTX-2", ((128, 5, 16, 20), (8, 40, 16)), None, 5),
    ("LTXV, guide", (128, 4, 16, 20), words(6), 4)], ids=["sound", "guide frames of the first stage only"])
def test_two_stages_of_ltx_go_on_at_twice_the_size(name, latent, conditions, frames):
    """Sound and guide frames stay as they are: only the video's own frames are resized."""
    small = case(name)
    large = dataclasses.replace(small, latent=latent, conditions=conditions or small.conditions)
    model, handles = load(small), (RunHandle(), RunHandle())
    config = LiteAttentionConfig(rule=Threshold(0.0), min_tokens=MIN_TOKENS)
    sample(small, attach(model, config, handle=handles[0]))
    out = sample(large, attach(model, config, handle=handles[1], continue_from=handles[0]))
    summary = handles[1].summary
    assert torch.isfinite(out).all() and summary.tokens == frames * 16 * 20
    assert all(summary.skipped_per_step) and not summary.notes


def test_another_size_starts_fresh_with_a_note_where_the_token_grid_is_not_known(kit, monkeypatch):
    from liteattention.host import families

    monkeypatch.setattr(families, "FAMILIES", {})
    first, second, handles = linked(kit)
    kit.sample(first)
    size = (5, 20, 20)
    alone = kit.sample(kit.lite(), size=size)
    assert torch.equal(kit.sample(second, size=size), alone)
    note, = handles[1].summary.notes
    assert "700 tokens" in note and "500 tokens" in note and note.startswith(f"{LAYERS} layers: ")


def test_a_prompt_that_the_first_run_did_not_have_warms_up(kit, runs):
    first, second, handles = linked(kit)
    out = split(kit, first, second, cfg=(1.0, 2.0))
    ages = {row: {age for (_, r), age in runs[1].passes.items() if r == row} for _, row in runs[1].passes}
    assert sorted(ages.values(), key=min) == [{4}, {8}] and torch.isfinite(out).all()
    assert handles[1].summary.skipped_per_step[0] > 0 and NO_MATCH in handles[1].summary.text()


@pytest.fixture
def server(monkeypatch):
    """A server that executes a prompt: `server(identity)`."""
    def executing(identity):
        instance = types.SimpleNamespace(last_prompt_id=identity, send_progress_text=lambda *args: None)
        monkeypatch.setitem(sys.modules, "server",
                            types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance)))
    return executing


def test_a_first_sampler_out_of_the_cache_is_continued_again(kit, server):
    """Something changes behind the first sampler only: ComfyUI does not run it anew, and its masks are there."""
    first, second, handles = linked(kit)
    server("one")
    kit.sample(first)
    once = kit.sample(second)
    server("two")
    assert torch.equal(kit.sample(second), once)
    assert handles[1].summary.skipped_per_step[0] > 0 and not handles[1].summary.notes


def test_of_several_runs_of_a_node_in_one_prompt_none_is_continued(kit, server):
    first, second, handles = linked(kit)
    alone = kit.sample(kit.lite())
    server("one")
    kit.sample(first)
    kit.sample(first, seed=2)
    assert torch.equal(kit.sample(second), alone) and run_module.SEVERAL in handles[1].summary.text()
    server("two")
    kit.sample(first)
    kit.sample(second)
    assert handles[1].summary.skipped_per_step[0] > 0, "the next prompt is another matter"
