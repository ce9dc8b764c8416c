"""The mask table: one mask per row, fresh where something changed."""

import pytest
import torch
from run_kit import in_threads

from liteattention.kernels import SkipMask, mask_nbytes
from liteattention.runtime.masks import RESIZED, SIZE_CHANGED, LayerKey, MaskTable, RowState, Signature
from liteattention.runtime.video_tokens import Grid

CPU = torch.device("cpu")
SIGNATURE = Signature(2, 300, 64, torch.float16)
ONE = SkipMask.full(1, 2, 300).nbytes


def key(name="double 0", model="model", **kwargs):
    return LayerKey(model, CPU, name, **kwargs)


def get(table, rows, name="double 0", **change):
    return [row.mask for row in table.open(key(name), rows, SIGNATURE._replace(**change))]


@pytest.fixture
def table():
    return MaskTable()


def test_rows_keep_their_mask_however_they_are_batched(table):
    a, b = get(table, ["a", "b"])
    assert get(table, ["b"])[0] is b
    assert get(table, ["b", "a"]) == [b, a]


def test_layers_ordinals_windows_models_and_devices_have_masks_of_their_own(table):
    keys = [key(), key("double 1"), key("single 0"), key(ordinal=1), key(window=(0, 1)), key(model="other"),
            LayerKey("model", torch.device("cpu", 0), "double 0")]
    masks = [table.open(k, ["a"], SIGNATURE)[0].mask for k in keys]
    assert len({id(m) for m in masks}) == len(keys)


@pytest.mark.parametrize("change", [{"seqlen": 301}, {"heads": 1}, {"head_dim": 96}])
def test_a_changed_row_starts_anew_alone_and_says_so(change):
    notes = []
    table = MaskTable(note=lambda *note: notes.append(note))
    a, b = get(table, ["a", "b"])
    a.passes[0] = b.passes[0] = 3
    fresh = get(table, ["a"], **change)[0]
    assert fresh is not a and fresh.passes == [0] and fresh.to_bool().all()
    assert get(table, ["b"])[0] is b
    assert notes == [(SIZE_CHANGED, "double 0")] and table.nbytes == fresh.nbytes + b.nbytes


def test_a_row_keeps_its_mask_in_another_precision_and_over_another_grid():
    notes = []
    table = MaskTable(note=lambda *note: notes.append(note))
    small, large = Grid(0, 3, 10, 10), Grid(0, 3, 20, 10)
    mask, = get(table, ["a"], grid=small)
    mask.words.fill_(1)
    mask.passes[0] = 3
    other, = get(table, ["a"], grid=small, dtype=torch.bfloat16)
    assert torch.equal(other.words, mask.words) and other.passes == [3]
    wide, = get(table, ["a"], grid=large, seqlen=600)
    assert wide.passes == [3] and not wide.to_bool().all() and table.nbytes == wide.nbytes
    assert set(notes) == {(RESIZED, "double 0")}


def test_masks_are_allocated_once_in_their_final_size(table, monkeypatch):
    made = []
    full = SkipMask.full
    monkeypatch.setattr(SkipMask, "full", lambda *a, **k: made.append(a) or full(*a, **k))
    for _ in range(5):
        get(table, ["a", "b"])
        get(table, ["b"])
    assert len(made) == 2 and table.peak_bytes == table.nbytes == 2 * ONE


def test_what_is_known_of_rows_is_told_without_making_any(table):
    get(table, ["a", "b"])[1].passes[0] = 1
    states = table.states(key(), ["a", "b", "c"], SIGNATURE)
    assert states == [RowState(), RowState(recorded=True), RowState()]
    assert table.states(key(), ["b"], SIGNATURE._replace(seqlen=301)) == [RowState()]
    assert table.states(key("double 1"), ["b"], SIGNATURE) == [RowState()]
    assert [list(rows) for rows in table.all_masks().values()] == [["a", "b"]]


def test_rows_that_have_a_mask_keep_it_where_there_is_no_memory_for_a_new_one(table, monkeypatch):
    a = get(table, ["a"])[0]

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("mask")

    with monkeypatch.context() as patch:
        patch.setattr(SkipMask, "full", full)
        with pytest.raises(torch.OutOfMemoryError):
            get(table, ["a", "b"])
    assert get(table, ["a"])[0] is a and table.nbytes == ONE


def test_a_layer_that_is_forgotten_frees_its_masks_and_starts_anew(table):
    a = get(table, ["a", "b"])[0]
    get(table, ["a"], "double 1")
    table.forget(key())
    table.forget(key())
    assert table.nbytes == ONE and table.peak_bytes == 3 * ONE and get(table, ["a"])[0] is not a


def test_allocations_happen_inside_the_guard(monkeypatch):
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

    monkeypatch.setattr(SkipMask, "full", watched)
    get(MaskTable(Guard), ["a", "b"])
    assert seen == [True, True]


def test_many_threads_get_one_mask_per_row(table):
    found = []

    def work(number):
        for i in range(50):
            found.append(get(table, ["a"], f"double {i}")[0])

    in_threads(work, range(8))
    assert len(found) == 400 and len({id(m) for m in found}) == 50 and table.nbytes == 50 * ONE


def test_closing_frees_everything(table):
    get(table, ["a"])
    table.close()
    assert table.nbytes == 0 and not table.all_masks()


def test_the_masks_of_wan_14b_at_720p_take_less_than_75_mb_per_prompt():
    assert 40 * mask_nbytes(1, 40, 75_600, 75_600) <= 75e6
