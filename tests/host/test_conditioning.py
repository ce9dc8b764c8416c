"""Rows are conditionings, not positions: cfg, unequal prompts, batches, regions, ranges, free memory."""

import comfy.samplers
import torch
from host_kit import LAYERS, SIZE

from liteattention.demo.pixels import prompt_tokens
from liteattention.runtime import RunHandle


def rows_of(run):
    return {row for _, row in run.passes}


def test_cfg_1_runs_one_row(kit, runs):
    kit.sample(kit.lite(), cfg=1.0)
    assert len(rows_of(runs[0])) == 1 and set(runs[0].passes.values()) == {4}


def test_prompts_of_unequal_length_come_in_two_calls(kit, runs):
    longer = [[torch.cat([prompt_tokens(0, 2, 1)] * 2, 1), {}]]
    handle = RunHandle()
    out = kit.sample(kit.lite(handle=handle), positive=longer)
    assert torch.isfinite(out).all()
    assert handle.summary.forward_passes == 8, "two forward passes per step"
    assert len(rows_of(runs[0])) == 2 and set(runs[0].passes.values()) == {4}
    assert handle.summary.skipped > 0


def test_each_latent_of_a_batch_has_rows_of_its_own(kit, runs):
    kit.sample(kit.lite(), batch=2)
    rows = rows_of(runs[0])
    assert len(rows) == 4 and {row for *_, row in rows} == {0, 1}
    assert len({uuid for uuid, *_ in rows}) == 2 and set(runs[0].passes.values()) == {4}
    a, b = ({key: bits for (key, (*_, row)), bits in runs[0].bits.items() if row == i} for i in (0, 1))
    assert any(not torch.equal(a[key], b[key]) for key in a), "two clips do not share decisions"


def test_regional_prompts(kit, runs):
    """A region of the positive prompt: ComfyUI adds a copy, uuid and all, to the negative ones."""
    half = SIZE[2] // 2
    region = [prompt_tokens(1, 1, 0), {"area": (SIZE[0], SIZE[1], half, 0, 0, 0), "set_area_to_bounds": False}]
    whole = [prompt_tokens(0, 2, 1), {}]
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle), positive=[whole, region])
    rows = rows_of(runs[0])
    assert len(rows) == 4 and len({uuid for uuid, *_ in rows}) == 3
    assert set(runs[0].passes.values()) == {4}
    assert not handle.summary.notes, "a region has a shape of its own and keeps it"


def test_a_prompt_that_takes_over_in_mid_run_starts_with_every_tile(kit, runs):
    first = [prompt_tokens(0, 2, 1), {"start_percent": 0.0, "end_percent": 0.5}]
    second = [prompt_tokens(1, 3, 2), {"start_percent": 0.5, "end_percent": 1.0}]
    kit.sample(kit.lite(), steps=8, positive=[first, second])
    ages = {row: {age for (_, r), age in runs[0].passes.items() if r == row} for row in rows_of(runs[0])}
    assert len(ages) == 3 and all(len(a) == 1 for a in ages.values())
    ages = sorted(a.pop() for a in ages.values())
    assert ages[-1] == 8 and 8 <= ages[0] + ages[1] <= 9 and ages[0] >= 1, "both halves, perhaps a step of overlap"


def test_joining_and_splitting_by_free_memory_changes_nothing(kit, runs, monkeypatch):
    """ComfyUI decides at every evaluation whether both conditionings fit; the masks follow their row."""
    joined = kit.sample(kit.lite(), steps=6)
    from comfy.model_patcher import ModelPatcher

    free = ModelPatcher.get_free_memory
    steps, batches = [], []
    monkeypatch.setattr(ModelPatcher, "get_free_memory",
                        lambda self, device: 0 if len(steps) % 2 else free(self, device))
    model = kit.lite()
    inner = model.model_options["transformer_options"]

    def watch(func, q, *args, **kwargs):
        batches.append(q.shape[0])
        return ours(func, q, *args, **kwargs)

    ours = inner["optimized_attention_override"]
    inner["optimized_attention_override"] = watch
    flipping = kit.sample(model, steps=6, callback=lambda *args: steps.append(1))
    assert {1, 2} == set(batches), "the batch did flip"
    assert (flipping - joined).abs().max() < 1e-4
    # The uuids are new with every run; the number says which conditioning it is.
    one, other = ({(key, number, row): (run.passes[key, (uuid, number, row)], bits)
                   for (key, (uuid, number, row)), bits in run.bits.items()} for run in runs)
    assert one.keys() == other.keys() and len(one) == 2 * LAYERS
    for name, (passes, bits) in one.items():
        assert passes == other[name][0] == 6
        assert torch.equal(bits, other[name][1]), "the same tiles dropped, row by row"
    assert any(not bits.all() for _, bits in one.values())


def test_guiders_number_conditionings_as_they_like(kit, runs):
    """Dual CFG passes [negative, middle, positive]; each keeps its own row."""
    from comfy_extras.nodes_custom_sampler import BasicScheduler, DualCFGGuider, RandomNoise, SamplerCustomAdvanced

    model = kit.lite()
    middle = [[prompt_tokens(1, 1, 1), {}]]
    guider = DualCFGGuider.execute(model, kit.positive, middle, kit.negative, 2.0, 1.5, "regular").args[0]
    sigmas = BasicScheduler.execute(model, "simple", 4, 1.0).args[0]
    with torch.inference_mode():
        SamplerCustomAdvanced.execute(RandomNoise.execute(1).args[0], guider, comfy.samplers.sampler_object("euler"),
                                      sigmas, {"samples": kit.latent()})
    assert len(rows_of(runs[0])) == 3 and set(runs[0].passes.values()) == {4}
