"""The mask table: one mask per row, fresh where something changed, within its limit."""

import threading

import pytest
import torch

from liteattention.kernels import SkipMask
from liteattention.runtime.state import LayerKey, MaskTable

CPU = torch.device("cpu")


def key(name="double 0", **kwargs):
    return LayerKey("model", CPU, name, **kwargs)


def get(table, rows, name="double 0", seqlen=300, dtype=torch.float16, **kwargs):
    return table.masks(key(name, **kwargs), rows, 2, seqlen, 64, dtype)


def test_rows_keep_their_mask_however_they_are_batched():
    table = MaskTable(2**20)
    a, b = get(table, ["a", "b"])
    assert get(table, ["b"])[0] is b
    assert get(table, ["b", "a"]) == [b, a]


def test_layers_ordinals_windows_models_and_devices_have_masks_of_their_own():
    table = MaskTable(2**20)
    keys = [key(), key("double 1"), key("single 0"), key(ordinal=1), key(window=(0, 1)),
            LayerKey("other model", CPU, "double 0")]
    masks = [table.masks(k, ["a"], 2, 300, 64, torch.float16)[0] for k in keys]
    assert len({id(m) for m in masks}) == len(keys)


@pytest.mark.parametrize("change", [{"seqlen": 301}, {"dtype": torch.bfloat16}])
def test_a_changed_row_starts_fresh_alone_and_says_so(change):
    notes = []
    table = MaskTable(2**20, note=notes.append)
    a, b = get(table, ["a", "b"])
    a.passes[0] = b.passes[0] = 3
    fresh = get(table, ["a"], **change)[0]
    assert fresh is not a and fresh.passes == [0]
    assert get(table, ["b"])[0] is b
    assert len(notes) == 1 and "starting fresh: layer double 0" in notes[0] and "became" in notes[0]


def test_masks_are_allocated_once_in_their_final_size(monkeypatch):
    made = []
    full = SkipMask.full
    monkeypatch.setattr(SkipMask, "full", lambda *a, **k: made.append(a) or full(*a, **k))
    table = MaskTable(2**20)
    for _ in range(5):
        get(table, ["a", "b"])
        get(table, ["b"])
    assert len(made) == 2
    assert table.peak_bytes == table.nbytes == 2 * SkipMask.full(1, 2, 300).nbytes


def test_above_the_limit_the_layers_that_skip_least_go():
    one = SkipMask.full(1, 2, 300).nbytes
    table = MaskTable(2 * one)
    densities = {"double 0": 0.9, "double 1": 0.2, "double 2": 0.95, "double 3": 0.4}
    for name, density in densities.items():
        mask = get(table, ["a"], name)[0]
        bits = torch.zeros(mask.to_bool().numel(), dtype=torch.bool)
        bits[:round(density * bits.numel())] = True
        mask.words.copy_(SkipMask.from_bool(bits.view_as(mask.to_bool()), 300, 300).words)
        mask.passes[0] = 1
        table.enforce_limit()
        assert table.nbytes <= 2 * one
    assert table.dense_layers == ["double 0", "double 2"]
    assert {k.name for k in table.all_masks()} == {"double 1", "double 3"}
    assert table.is_dense(key("double 2")) and not table.is_dense(key("double 1"))
    assert table.peak_bytes == 3 * one, "one layer over, while it is being recorded"


def test_a_layer_that_has_not_recorded_is_not_judged():
    table = MaskTable(1)
    get(table, ["a"])
    assert table.enforce_limit() == []


def test_a_layer_let_go_by_another_device_in_between_is_no_error():
    table = MaskTable(2**20)
    masks = get(table, ["a", "b"])
    assert table.fresh_rows(key(), ["a", "b"]) == masks
    table.forget(key())
    assert table.fresh_rows(key(), ["a", "b"]) == []


def test_allocations_happen_inside_the_guard():
    inside, seen = [], []

    class Guard:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *_):
            inside.pop()

    full = SkipMask.full

    def watched(*args, **kwargs):
        seen.append(bool(inside))
        return full(*args, **kwargs)

    table = MaskTable(2**20, Guard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SkipMask, "full", watched)
        get(table, ["a", "b"])
    assert seen == [True, True]


def test_many_threads_get_one_mask_per_row():
    table = MaskTable(2**24)
    found, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        for i in range(50):
            found.append((i, get(table, ["a"], f"double {i}")[0]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({id(m) for _, m in found}) == 50


def test_closing_lets_go_of_everything():
    table = MaskTable(2**20)
    get(table, ["a"])
    table.close()
    assert table.nbytes == 0 and not table.all_masks()
