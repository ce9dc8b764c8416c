"""The model families, each on a tiny instance; and models without a row in the table."""

import ast
import re
import types
import weakref
from pathlib import Path

import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from family_cases import CASES, case
from family_kit import MIN_TOKENS, NO_LAYER, STEPS, check, conditioning, load, run, sample
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


OUT_OF_REACH = {"ErnieImageModel": "ernie.model", "HunYuanDiT": "hydit.attn_layers", "NaDiT": "seedvr.attention",
                "HunYuanDiTPlain": "hunyuan3dv2_1.hunyuandit", "PixArtMS": "pixart.blocks"}


def test_networks_that_are_named_as_out_of_reach_hand_attention_no_options():
    named = PAGE.read_text(encoding="utf-8").partition("**Out of reach**")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", named)) == {*OUT_OF_REACH, "transformer_options"}
    for module in OUT_OF_REACH.values():
        path = Path(comfy.sd.__file__).parent / "ldm" / f"{module.replace('.', '/')}.py"
        if not path.exists():
            continue  # an older ComfyUI
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Call) and re.match(r"(\w+\.)?optimized_attention", ast.unparse(node.func))]
        assert calls and not any(word.arg in ("transformer_options", None) for call in calls for word in call.keywords)


def test_the_audio_of_multitalk_does_not_reach_the_override():
    multitalk = pytest.importorskip("comfy.ldm.wan.model_multitalk")
    wan = case("Wan T2V")
    model, attention = load(wan), multitalk.SingleStreamMultiAttention(
        128, 64, num_heads=1, qkv_bias=True, operations=comfy.ops.disable_weight_init)
    block = types.SimpleNamespace(norm_x=torch.nn.LayerNorm(128), audio_cross_attn=attention)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    patched = model.clone()
    audio = multitalk.MultiTalkCrossAttnPatch(
        types.SimpleNamespace(model=types.SimpleNamespace(blocks=[block] * 2)))
    patched.set_model_patch(lambda arguments: audio(arguments), "attn2_patch")
    patched.model_options["transformer_options"]["audio_embeds"] = torch.randn(2 * 5, 8, 64)
    handle = RunHandle()
    out, plain = run(wan, patched, -30.0, handle), sample(wan, patched)
    assert (out - plain).abs().max() < 1e-3 and not torch.equal(plain, sample(wan, model))
    summary = handle.summary
    assert dense_calls(summary) == {"cross-attention": 2 * summary.forward_passes}
    assert summary.sparse_calls == 2 * summary.forward_passes


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


@pytest.mark.parametrize("reaches", [False, True], ids=["as in 0.33", "with transformer_options"])
def test_causal_wan_stays_dense_from_its_first_square_chunk_on_and_the_summary_says_what_it_is(monkeypatch, reaches):
    """In ComfyUI 0.33 a chunk calls its blocks without `transformer_options`, so that no call reaches an override."""
    ar_model = pytest.importorskip("comfy.ldm.wan.ar_model")
    causal = case("Wan causal, all frames at once")
    model, given, original = load(causal), {}, ar_model.optimized_attention
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs["transformer_options"]), with_kwargs=True)

    def attention(*args, transformer_options, **kwargs):
        return original(*args, transformer_options={**given, "block_index": 0}, **kwargs)

    def sampled(patched):
        noise = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                patched, noise, 1.0, comfy.samplers.ksampler("ar_video"), torch.tensor([1.0, 0.5, 0.0]),
                conditioning(causal, 2), conditioning(causal, 3), torch.zeros_like(noise), seed=1, disable_pbar=True)

    if reaches:
        monkeypatch.setattr(ar_model, "optimized_attention", attention)
    handle = RunHandle()
    config = LiteAttentionConfig(rule=Threshold(0.0), min_tokens=1)
    assert torch.equal(sampled(attach(model, config, handle=handle)), sampled(model))
    hook.remove()
    summary = handle.summary
    assert summary.sparse_calls == 0 and "Causal Wan" in summary.text()
    if reaches:
        assert dense_calls(summary)["causal attention with a cache"] >= 2 * 5


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
