"""The model families, each on a tiny instance; and models without a row in the table."""

import re
import weakref
from pathlib import Path

import comfy.sd
import pytest
import torch
from family_cases import CASES, case
from family_kit import MIN_TOKENS, NO_LAYER, STEPS, check, load, run, sample
from host_kit import LAYERS, dense_calls
from safetensors.torch import load_file, save_file

from liteattention.host import attach, families
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_family(case, runs, monkeypatch):
    check(case, runs, monkeypatch)


def test_every_network_of_the_table_has_a_case_and_a_row_in_the_docs():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert sorted(documented) == sorted(families.FAMILIES)
    assert {case.network.split(":")[1] for case in CASES} == set(families.FAMILIES)


@pytest.mark.parametrize("entry", [True, False], ids=["takes containers", "takes tensors"])
def test_the_fallback_attention_of_a_dense_call_gets_its_containers(entry):
    """It can free q before it allocates anything: nobody else holds it."""
    minimax = case("MiniMax H3")
    model = load(minimax)
    plain = sample(minimax, model)
    freed = []

    def fallback(func, q, k, v, heads, **kwargs):
        return func(q, k, v, heads, **kwargs)

    def containers(q, k, v, heads, **kwargs):
        tensor = q.take()
        alive, copy = weakref.ref(tensor), tensor.clone()
        del tensor
        freed.append(alive() is None)
        import comfy.ldm.modules.attention as attention

        return attention.optimized_attention(copy, k.take(), v.take(), heads, **kwargs)

    if entry:
        fallback.container_function = containers
    model.model_options["transformer_options"]["optimized_attention_override"] = fallback
    handle = RunHandle()
    config = LiteAttentionConfig(rule=Threshold(-30.0), min_tokens=MIN_TOKENS, warmup_steps=1, dense_blocks="0")
    out = sample(minimax, attach(model, config, handle=handle))
    assert (out - plain).abs().max() < 1e-3
    summary = handle.summary
    assert dense_calls(summary) == {"dense_blocks": summary.forward_passes}
    assert summary.sparse_calls == summary.forward_passes >= STEPS
    assert freed == ([True] * summary.forward_passes if entry else [])


def test_a_model_of_no_family_that_does_not_number_its_blocks_stays_dense(monkeypatch):
    ltxv = case("LTXV")
    model, handle = load(ltxv), RunHandle()
    monkeypatch.setattr(families, "FAMILIES", {})
    assert torch.equal(run(ltxv, model, 0.0, handle), sample(ltxv, model))
    summary = handle.summary
    assert summary.sparse_calls == 0 and dense_calls(summary)[NO_LAYER] == 2 * summary.forward_passes


def test_a_model_of_no_family_keeps_both_ends_of_a_longer_sequence(runs, monkeypatch):
    hunyuan = case("HunyuanVideo")
    model, handle = load(hunyuan), RunHandle()
    monkeypatch.setattr(families, "FAMILIES", {})
    assert torch.isfinite(run(hunyuan, model, 0.0, handle)).all()
    summary, text = handle.summary, hunyuan.text[0]
    assert summary.tokens == hunyuan.video + text
    assert summary.sparse_calls == len(hunyuan.layers) * summary.forward_passes
    for bits in runs[0].bits.values():
        assert bits[..., :2].all() and bits[..., -2:].all(), f"{text} tokens at either end"


def test_the_reference_frame_before_the_video_stays(kit, model_folder, runs, tmp_path):
    """Wan Fun: N is one frame longer than the latent; the reference stays, the rest skips."""
    state = load_file(model_folder / "tiny_wan_t2v.safetensors")
    dim = state["patch_embedding.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    state["ref_conv.weight"] = (torch.randn(dim, 16, 2, 2, generator=generator) / 64).half()
    state["ref_conv.bias"] = torch.zeros(dim).half()
    save_file(state, tmp_path / "tiny_fun.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "tiny_fun.safetensors"),
                                          model_options={"dtype": torch.float32})
    reference = {"reference_latents": [torch.randn(1, 16, 1, 20, 20, generator=generator)]}
    positive, negative = ([[tokens, reference]] for (tokens, _), in (kit.positive, kit.negative))
    handle = RunHandle()
    out = kit.sample(kit.lite(model, handle, rule=Threshold(-0.5)), positive=positive, negative=negative)
    assert torch.isfinite(out).all()
    summary = handle.summary
    assert summary.tokens == 700 + 100 and summary.sparse_calls == 4 * LAYERS and summary.skipped > 0
    for bits in runs[0].bits.values():
        assert bits[..., 0].all() and bits[..., 0, :].all()
