"""Other nodes that change weights, devices and memory: LoRA, two samplers, MultiGPU, low VRAM, tiles, malloc graph."""

import contextlib
import re
import sys
import types
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from host_kit import LAYERS, Kit
from interop_kit import ORDERS, SMALL, STEPS, check_dense_runs, in_order, node, plain, rows_of, sample_with
from safetensors.torch import save_file

import nodes
from liteattention.host import compat
from liteattention.runtime import RunHandle, Threshold

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lora(kit, tmp_path, monkeypatch):
    """The core loader with a LoRA of the tiny model's self-attention: name, strength -> (model -> model)."""
    def loader(seed, strength):
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, weight in kit.model.get_model_object("diffusion_model").state_dict().items():
            if re.fullmatch(r"blocks\.\d\.self_attn\.[qkvo]\.weight", name):
                key = f"diffusion_model.{name.removesuffix('.weight')}"
                weights[f"{key}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 16
                weights[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 16
        assert len(weights) == 2 * 4 * LAYERS
        save_file(weights, tmp_path / f"{seed}.safetensors")
        return lambda model: nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{seed}.safetensors", strength)[0]

    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda folder, name: str(tmp_path / name))
    return loader


@pytest.mark.parametrize("order", ORDERS)
def test_lora(kit, runs, lora, order):
    add = lora(1, 0.5)
    alone = check_dense_runs(kit, order, add)
    assert (alone - plain(kit)).abs().max() > 0.01, "it has an effect"
    handle = RunHandle()
    kit.sample(in_order(kit, order, add, handle), STEPS, size=SMALL)
    assert handle.summary.sparse_calls == STEPS * LAYERS and set(runs[-1].passes.values()) == {STEPS}


@pytest.fixture(scope="module")
def low_noise(model_folder):
    """The second network of a pair."""
    return Kit(model_folder).model


def test_two_samplers_of_two_networks_start_afresh(kit, low_noise, runs, lora):
    """Wan 2.2: high noise, then low noise, each with a LoRA of its own and a KSamplerAdvanced; nothing is linked."""
    def chain(**settings):
        latent = {"samples": kit.latent(size=SMALL)}
        for model, seed, noise, start, end in ((kit.model, 1, "enable", 0, 3), (low_noise, 2, "disable", 3, 6)):
            model = lora(seed, 0.5)(model)
            model = kit.lite(model, **settings) if settings else model
            with torch.inference_mode():
                latent, = nodes.KSamplerAdvanced().sample(model, noise, 1, 6, 2.0, "euler", "simple", kit.positive,
                                                          kit.negative, latent, start, end, "enable")
        return latent["samples"]

    dense = chain()
    assert torch.equal(chain(dense_blocks="0--1"), dense)
    runs.clear()
    assert (chain(rule=Threshold(-30.0)) - dense).abs().max() < 1e-3
    assert [set(run.passes.values()) for run in runs] == [{3}, {3}]
    first, second = ({key.model for key, _ in run.passes} for run in runs)
    assert first.isdisjoint(second) and not rows_of(runs[0]) & rows_of(runs[1])
    assert [run.close().plan for run in runs] == ["step 1 of 3 dense"] * 2


@pytest.mark.parametrize("order", ORDERS)
def test_multigpu_work_units(kit, runs, monkeypatch, order):
    """Core's node clones the model for a second device and gives each a thread; here the CPU goes by two names."""
    split = node("comfy_extras.nodes_multigpu", "MultiGPUCFGSplitNode")
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)

    def spread(model):
        model = split.execute(model, 2).args[0]
        assert len(model.get_additional_models_with_key("multigpu")) == 1
        return model

    alone = check_dense_runs(kit, order, spread)
    assert (alone - plain(kit)).abs().max() < 1e-4, "it computes the same"
    handle = RunHandle()
    kit.sample(in_order(kit, order, spread, handle, rule=Threshold(-0.5)), STEPS, size=SMALL)
    summary, run = handle.summary, runs[-1]
    assert summary.forward_passes == 2 * STEPS and summary.sparse_calls == 2 * STEPS * LAYERS and summary.skipped > 0
    assert len({key.model for key, _ in run.passes}) == 2 == len(rows_of(run))
    assert set(run.passes.values()) == {STEPS} and not summary.notes


@pytest.mark.parametrize("order", ORDERS)
def test_low_vram(kit, runs, lora, monkeypatch, order):
    """Most weights stay off the device and are patched and cast call by call, LoRA included."""
    add, load, lowered = lora(1, 0.5), ModelPatcher.load, []

    def partly(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, 100_000, force_patch_weights, False)
        lowered.append(self.model.model_lowvram)

    patched = kit.sample(add(kit.model), STEPS, size=SMALL)
    comfy.model_management.unload_all_models()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ModelPatcher, "load", partly)
            alone = check_dense_runs(kit, order, add)
            handle = RunHandle()
            kit.sample(in_order(kit, order, add, handle), STEPS, size=SMALL)
    finally:
        comfy.model_management.unload_all_models()
    assert lowered and all(lowered) and (alone - patched).abs().max() < 1e-3
    assert handle.summary.sparse_calls == STEPS * LAYERS and set(runs[-1].passes.values()) == {STEPS}


def tiled(model):
    """Evaluates the latent in two halves with an overlap, as tiled diffusion nodes do."""
    def by_tiles(apply_model, given):
        x = given["input"]
        out, weight = torch.zeros_like(x), torch.zeros_like(x)
        for start in (0, x.shape[-1] - 12):
            tile = (..., slice(start, start + 12))
            out[tile] += apply_model(x[tile], given["timestep"], **given["c"])
            weight[tile] += 1
        return out / weight

    patched = model.clone()
    patched.set_model_unet_function_wrapper(by_tiles)
    return patched


@pytest.mark.parametrize("order, memory", [*((order, "joined") for order in ORDERS), (ORDERS[0], "split")])
def test_tiles_have_masks_of_their_own(kit, runs, monkeypatch, order, memory):
    """Every tile comes with the same rows and the same shape: one mask would age twice a step and mix two images."""
    if memory == "split":
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    check_dense_runs(kit, order, tiled if memory == "joined" else lambda model: tiled(model))
    handle = RunHandle()
    kit.sample(in_order(kit, order, tiled, handle, rule=Threshold(-0.5)), STEPS)
    run, summary = runs[-1], handle.summary
    assert set(run.passes.values()) == {STEPS} and len(run.passes) == 2 * 2 * LAYERS
    windows = {key.window for key, _ in run.passes}
    assert len(windows) == 2 and not summary.notes and summary.skipped > 0
    one, other = ([bits for (key, _), bits in run.bits.items() if key.window == window] for window in windows)
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True)), "two tiles do not share decisions"


@pytest.mark.parametrize("sampler, evaluations", [("sa_solver_pece", 2 * STEPS - 1), ("heun", 2 * STEPS - 1)])
def test_a_sampler_that_comes_back_to_a_noise_level_is_no_tile(kit, runs, sampler, evaluations):
    import comfy.samplers

    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this ComfyUI has no {sampler}")
    kit.sample(kit.lite(), STEPS, sampler=sampler, size=SMALL)
    assert {key.window for key, _ in runs[-1].passes} == {None}
    assert set(runs[-1].passes.values()) == {runs[-1].close().forward_passes} == {evaluations}


def test_a_cached_guider_and_model_with_other_nodes_start_afresh(kit, runs):
    """ComfyUI keeps MODEL and GUIDER objects from prompt to prompt; each run is as if alone."""
    from comfy_extras.nodes_custom_sampler import CFGGuider
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def build():
        model = tiled(kit.lite(SkipLayerGuidanceDiT.execute(kit.model, 3.0, 0.0, 1.0, "1,2", "").args[0]))
        return CFGGuider.execute(model, kit.positive, kit.negative, 2.0).args[0]

    guider = build()
    results = [sample_with(kit, guider, SMALL) for _ in range(2)]
    assert torch.equal(*results) and torch.equal(results[0], sample_with(kit, build(), SMALL))
    assert all(set(run.passes.values()) == {STEPS} for run in runs) and len(runs) == 3


def test_the_malloc_graph_is_paused_where_there_is_one(monkeypatch):
    """Newer ComfyUI has a recorder of allocations; without it, or without its pause, there is nothing to do."""
    paused = contextlib.nullcontext("paused")
    for module, expected in ((None, None), (types.SimpleNamespace(), None),
                             (types.SimpleNamespace(pause_malloc_graph=lambda: paused), "paused")):
        monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
        monkeypatch.setattr(sys.modules["comfy"], "model_prefetch", module, raising=False)
        with compat.allocation_guard() as entered:
            assert entered == expected


def test_each_row_of_the_interop_table_names_tests_that_exist():
    table = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25
    for name, _, _, tests in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", tests)
        assert named, name
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / "host" / file).read_text(encoding="utf-8"),
                             re.MULTILINE), (name, file, test)
