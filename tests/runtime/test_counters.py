"""Counts of a run: calls by reason, tiles by step and layer, read once per step."""

import pytest
import torch
from run_kit import TILES, N, forward, in_threads, play, sampling_run

from liteattention.runtime.counters import COUNTERS, LAYERS_PER_BLOCK, Counters
from liteattention.runtime.masks import LayerKey
from liteattention.runtime.reasons import CROSS_ATTENTION, WARMUP

CPU = torch.device("cpu")


def key(layer):
    return LayerKey("m", CPU, f"double {layer}")


def test_the_counts_of_the_layers_sum_up_to_those_of_the_run():
    run = sampling_run(8, warmup_steps=1)
    for step in range(4):
        before = {key: sum(int(mask.active_tiles()) for mask in rows.values())
                  for key, rows in run.masks.all_masks().items()}
        forward(run, step)
        run.end_step(step)
        densities = run.counters.densities()
        if step:
            assert run.counters.per_step[step] == [sum(before.values()), 2 * TILES]
            assert densities == {key: active / TILES for key, active in before.items()}, "as the step began"
        else:
            assert densities == {}, "recording is no measure"
    counters = run.counters
    assert counters.sparse_total == counters.tiles_total == 8 * TILES and counters.dense_tiles == 0
    for column, total in enumerate((counters.tiles_computed, counters.tiles_total)):
        assert total == sum(sums[column] for sums in counters.per_step.values())
        assert total == sum(sums[column] for steps in counters.per_layer.values() for sums in steps.values())
    assert counters.layer_shares(4).keys() == {"double 0", "double 1"}
    assert counters.shares(5)[4] is None, "a step in which nothing ran has no share"


def test_a_row_that_joins_late_does_not_count_for_the_density():
    run = sampling_run(8, warmup_steps=1)
    play(run, 1, rows=("positive",))
    key = next(iter(run.masks.all_masks()))
    active = int(run.masks.all_masks()[key]["positive", 0].active_tiles())
    play(run, 1)
    assert run.counters.densities()[key] == 2 * active / TILES


def test_dense_calls_count_by_reason_and_with_every_tile_they_have():
    counters = Counters()
    for number in range(3):
        counters.add_dense(number // 2, WARMUP, 100)
    counters.add_dense(1, CROSS_ATTENTION, 0)
    assert counters.end_step(0) == 0
    assert counters.dense == {WARMUP: 3, CROSS_ATTENTION: 1} and counters.forward_passes == 2
    assert (counters.tiles_computed, counters.tiles_total, counters.dense_tiles) == (300, 300, 300)
    assert counters.end_step(1) is None


def test_counters_grow_in_blocks_and_lose_nothing():
    guarded = []

    class Guard:
        def __enter__(self):
            guarded.append(1)

        def __exit__(self, *args):
            return None

    counters = Counters(Guard)
    layers = 2 * LAYERS_PER_BLOCK + 3
    for step in range(2):
        for layer in range(layers):
            with torch.inference_mode():
                on_device = counters.on_device(key(layer))
                on_device[step] += layer
            assert on_device.shape == (COUNTERS,) and on_device.is_contiguous() and on_device.dtype == torch.int64
            counters.add_sparse(0, key(layer), 1000, 0, N)
        assert counters.end_step(step) == pytest.approx(1 - sum(range(layers)) / layers / 1000)
        assert counters.densities() == {key(i): i / 1000 for i in range(layers)}
    assert len(guarded) == 3 and counters.tiles_computed == 2 * sum(range(layers))


def test_no_memory_for_counters_leaves_the_others_readable(monkeypatch):
    def zeros(*args, **kwargs):
        raise torch.OutOfMemoryError("counters")

    counters = Counters()
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError):
        counters.on_device(key(0))
    assert counters.end_step(0) is None


def test_devices_may_count_at_once():
    counters = Counters()

    def work(number):
        for _ in range(200):
            counters.on_device(key(number))
            counters.add_sparse(number, key(number), 10, 0, N)
            counters.add_dense(number, WARMUP, 5)

    in_threads(work, range(8))
    counters.end_step(0)
    assert (counters.sparse, counters.dense, counters.tiles_total) == (1600, {WARMUP: 1600}, 24_000)
    assert counters.forward_passes == 8
