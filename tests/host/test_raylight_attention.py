"""LiteAttention in a model that xFuser splits over processes, as Raylight's workers do (see parallel_kit.py)."""

import os
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import parallel_kit
import pytest
import torch
from comfyui import find_comfyui
from host_kit import LAYERS

from liteattention.runtime import Threshold, reasons
from liteattention.runtime.merged_summary import from_plain, merged

pytestmark = pytest.mark.skipif(sys.platform != "linux" or util.find_spec("xfuser") is None,
                                reason="Raylight needs Linux; xfuser and yunchang from tools/requirements.raylight.txt")
WORLD, STEPS = 2, 4


def played(folder, ulysses, cfg):
    """The results of every rank; none of the processes outlives this call."""
    world = ulysses * cfg
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    files = [open(folder / f"log{rank}", "w+") for rank in range(world)]
    running = [subprocess.Popen(
        [sys.executable, parallel_kit.__file__, *map(str, (folder, find_comfyui(), rank, world, ulysses, cfg))],
        cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT) for rank, file in enumerate(files)]
    deadline = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            if any(process.poll() for process in running):
                break
            time.sleep(0.1)
        codes = [process.poll() for process in running]
    finally:
        for process, file in zip(running, files, strict=True):
            process.kill()
            process.wait()
            file.close()
    assert codes == [0] * world, "\n".join(Path(file.name).read_text()[-3000:] for file in files)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Two processes, each with half of the heads."""
    return played(tmp_path_factory.mktemp("heads"), WORLD, 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two processes, each with one conditioning."""
    return played(tmp_path_factory.mktemp("rows"), 1, WORLD)


@pytest.fixture(scope="module")
def heads_and_rows(tmp_path_factory):
    """Four processes: half of the heads of one conditioning in each."""
    return played(tmp_path_factory.mktemp("both"), WORLD, WORLD)


def latents(results, name):
    """The latent of a run, which every rank has."""
    first, *others = (result[name]["latent"] for result in results)
    assert all(torch.equal(first, other) for other in others), name
    return first


def summary(results, name):
    return merged([from_plain(result[name]["summary"]) for result in results])


def alone(kit, runs, **sample):
    """The masks of the run in one process, by layer and number of the conditioning, and its skipped share."""
    kit.sample(kit.lite(rule=Threshold(parallel_kit.SETTINGS["rule"][1])), **sample)
    return {(key.name, row.number): bits for (key, row), bits in runs[-1].bits.items()}


def differing(masks, others):
    """Share of the bits that differ: the sums of dense attention have another order."""
    assert masks.keys() == others.keys()
    return sum((masks[key] != others[key]).sum().item() for key in masks) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize("name", ["lite", "odd", "inner", "inner odd"])
def test_either_door_takes_every_self_attention(heads, name):
    run = summary(heads, name)
    assert run.sparse_calls == WORLD * STEPS * LAYERS and run.dense_calls == {reasons.CROSS_ATTENTION: run.sparse_calls}
    assert not run.notes and run.skipped > 0 and len(run.ranks) == WORLD
    dense = latents(heads, "odd dense" if "odd" in name else "dense")
    assert not torch.equal(latents(heads, name), dense)


def test_both_doors_give_the_same_latent(heads):
    assert torch.equal(latents(heads, "lite"), latents(heads, "inner"))
    assert torch.equal(latents(heads, "odd"), latents(heads, "inner odd"))


def test_each_rank_has_the_masks_of_its_heads(heads, kit, runs):
    whole = alone(kit, runs)
    for rank, result in enumerate(heads):
        assert differing(result["lite"]["masks"], {key: bits[:, rank:rank + 1] for key, bits in whole.items()}) < 0.01
        assert result["lite"]["summary"]["mask_bytes"] == runs[-1].masks.peak_bytes // WORLD


@pytest.mark.parametrize("results", ["heads", "rows", "heads_and_rows"])
def test_twice_is_once_and_off_is_dense(results, request):
    results = request.getfixturevalue(results)
    assert torch.equal(latents(results, "twice"), latents(results, "lite"))
    for name in ("off", *(["inner off"] if "inner off" in results[0] else [])):
        assert torch.equal(latents(results, name), latents(results, "dense"))
        assert {result[name]["state"] for result in results} == {"not attached"}


def test_rows_that_go_to_other_processes_have_the_masks_that_they_have_alone(rows, kit, runs):
    run = summary(rows, "lite")
    assert run.sparse_calls == WORLD * STEPS * LAYERS and not run.notes
    assert run.dense_calls == {reasons.CROSS_ATTENTION: run.sparse_calls}
    whole = alone(kit, runs)
    held = [result["lite"]["masks"] for result in rows]
    assert all(len(masks) == LAYERS for masks in held) and not held[0].keys() & held[1].keys()
    assert differing({**held[0], **held[1]}, whole) < 0.01


def test_heads_and_rows_are_split_together(heads_and_rows, heads, kit, runs):
    run = summary(heads_and_rows, "lite")
    assert run.dense_calls == {reasons.CROSS_ATTENTION: run.sparse_calls} and not run.notes
    assert run.sparse_calls == len(heads_and_rows) * STEPS * LAYERS
    assert run.tiles_total == summary(heads, "lite").tiles_total
    whole, found = alone(kit, runs), {}
    for rank, result in enumerate(heads_and_rows):
        found |= {(*key, rank % WORLD): bits for key, bits in result["lite"]["masks"].items()}
    head = range(WORLD)
    assert differing(found, {(*key, h): bits[:, h:h + 1] for key, bits in whole.items() for h in head}) < 0.01


def test_a_ring_stays_dense_for_its_reason(heads):
    run = summary(heads, "ring")
    assert torch.equal(latents(heads, "ring"), latents(heads, "dense"))
    assert set(run.dense_calls) == {reasons.RING} and run.headline().startswith("off: sequence parallelism by ring")


@pytest.mark.parametrize("name, dense, why", [
    ("never reached", "never reached dense", "this Raylight computes it in another way"),
    ("no door", "dense", "has no select_flash_attn_impl"),
    ("taken later", "dense", "MiniMax H3 SLA, set by a node after it, has the attention")])
def test_a_door_that_is_not_there_or_not_reached_is_a_sentence(heads, name, dense, why):
    assert torch.equal(latents(heads, name), latents(heads, dense))
    assert why in summary(heads, name).headline() and not summary(heads, name).sparse_calls


def test_another_inner_attention_is_refused_with_both_names(heads):
    for result in heads:
        assert "MiniMax H3 SLA" in result["refused"] and "LiteAttention (Raylight)" in result["refused"]


def test_a_rank_without_memory_goes_on_dense_and_the_others_with_their_masks(heads):
    run = summary(heads, "out of memory")
    mine = from_plain(heads[-1]["out of memory"]["summary"])
    assert 0 < mine.dense_calls[reasons.OUT_OF_MEMORY] < STEPS * LAYERS
    assert reasons.OUT_OF_MEMORY not in from_plain(heads[0]["out of memory"]["summary"]).dense_calls
    assert any(note.startswith(f"rank {WORLD - 1}: memory ran out") for note in run.notes)
    assert torch.isfinite(latents(heads, "out of memory")).all()
