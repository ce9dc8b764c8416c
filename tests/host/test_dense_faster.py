"""Layers that stay too dense use the fallback attention, and timings are shared by runs with the same one."""

import gc
import sys
import weakref

import pytest
import torch
from host_kit import LAYERS, count_backend_calls, dense_calls

from liteattention.runtime import BreakEvens, RunHandle

module = sys.modules["liteattention.host.attach"]


@pytest.fixture
def dense_is_faster(monkeypatch):
    """As on a GPU where skipping never pays off; the fallback attentions asked for, in order."""
    asked = []

    def break_evens(fallback):
        asked.append(fallback)
        return BreakEvens(lambda *args: 0.01, lambda device: None)

    monkeypatch.setattr(module, "break_evens", break_evens)
    return asked


@pytest.mark.parametrize("override", [False, True])
def test_layers_that_stay_dense_use_the_fallback_attention(kit, monkeypatch, dense_is_faster, override):
    base, below = kit.watched(kit.model) if override else (kit.model, [])
    seen = count_backend_calls(monkeypatch)
    handle = RunHandle()
    out = kit.sample(kit.lite(base, handle), steps=8)
    summary = handle.summary
    # Of 8 steps the first records, and the second one's density decides for the others.
    assert summary.sparse_calls == 2 * LAYERS and dense_calls(summary)["dense attention is faster here"] == 6 * LAYERS
    assert [bool(share) for share in summary.skipped_per_step] == [i == 1 for i in range(8)]
    assert torch.isfinite(out).all() and summary.sparse_calls + sum(dense_calls(summary).values()) == len(seen)
    assert len(below) == (sum(dense_calls(summary).values()) if override else 0)
    fallback, = dense_is_faster
    assert (fallback is not None) == override


def test_on_a_cpu_no_layer_is_too_dense(kit):
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle))
    entry, = handle.summary.break_evens
    assert entry["source"] == "table" and entry["density"] == 1.0 and handle.summary.sparse_calls == 4 * LAYERS


def test_timings_belong_to_the_fallback_attention(kit):
    base, other = kit.watched(kit.model)[0], kit.watched(kit.model)[0]

    def fallback(model):
        return model.model_options["transformer_options"][module.OVERRIDE].lite_attention_fallback

    own, own_again, of_base, of_base_again, of_other = (
        module.break_evens(fallback(kit.lite(model))) for model in (kit.model, kit.lite(), base, kit.lite(base), other))
    assert own is own_again and of_base is of_base_again, "a second application looks below the first"
    assert len({own, of_base, of_other}) == 3


def test_it_does_not_keep_an_override_alive():
    def override(func, *args, **kwargs):
        return func(*args, **kwargs)

    shared = weakref.ref(module.break_evens(override))
    gone = weakref.ref(override)
    assert shared() is module.break_evens(override)
    del override
    gc.collect()
    assert gone() is None and shared() is None


def test_an_override_that_cannot_be_remembered_is_no_trouble(kit):
    class Unhashable:
        __hash__ = None

        def __call__(self, func, *args, **kwargs):
            return func(*args, **kwargs)

    override = Unhashable()
    assert isinstance(module.break_evens(override), BreakEvens)
    assert module.break_evens(override) is not module.break_evens(override)
