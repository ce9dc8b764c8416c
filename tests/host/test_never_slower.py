"""Dense layers in a real model go to the attention below ours, and what runs have timed is shared as it should be."""

import gc
import sys
import weakref

import pytest
import torch
from host_kit import LAYERS, count_backend_calls

from liteattention.runtime import BreakEvens, RunHandle, policy

module = sys.modules["liteattention.host.attach"]


@pytest.fixture
def dense_is_faster(monkeypatch):
    """As on a GPU where skipping never pays off; what was asked for, in order."""
    asked = []

    def break_evens(previous):
        asked.append(previous)
        return BreakEvens(lambda *args: 0.01, lambda device: None)

    monkeypatch.setattr(module, "break_evens", break_evens)
    return asked


@pytest.mark.parametrize("override", [False, True])
def test_dense_layers_go_to_what_was_there_before(kit, monkeypatch, dense_is_faster, override):
    base, below = kit.watched(kit.model) if override else (kit.model, [])
    seen = count_backend_calls(monkeypatch)
    handle = RunHandle()
    out = kit.sample(kit.lite(base, handle), steps=8)
    receipt = handle.receipt
    # Of 8 steps the first records, the second meets a density, the sixth tries again.
    assert receipt.taken == 3 * LAYERS and receipt.left[policy.DENSE_FASTER] == 5 * LAYERS
    assert [bool(share) for share in receipt.skipped_per_step] == [i in (1, 5) for i in range(8)]
    assert torch.isfinite(out).all() and receipt.taken + sum(receipt.left.values()) == len(seen)
    assert len(below) == (sum(receipt.left.values()) if override else 0)
    previous, = dense_is_faster
    assert (previous is not None) == override


def test_switched_off_every_layer_stays(kit, dense_is_faster):
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle, never_slower=False), steps=4)
    assert policy.DENSE_FASTER not in handle.receipt.left and handle.receipt.break_evens == []


def test_on_a_cpu_it_changes_nothing(kit):
    handle = RunHandle()
    assert torch.equal(kit.sample(kit.lite(handle=handle)), kit.sample(kit.lite(never_slower=False)))
    entry, = handle.receipt.break_evens
    assert entry["source"] == "table" and entry["density"] == 1.0


def test_what_runs_time_belongs_to_the_override_below_ours(kit, monkeypatch):
    given = []
    make_run_wrapper = module.make_run_wrapper
    monkeypatch.setattr(module, "make_run_wrapper", lambda *args: given.append(args[4]) or make_run_wrapper(*args))
    base, other = kit.watched(kit.model)[0], kit.watched(kit.model)[0]
    own, own_again, of_base, of_base_again, of_other = (
        kit.lite(model) and given[-1] for model in (kit.model, kit.lite(), base, kit.lite(base), other))
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
