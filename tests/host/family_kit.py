"""Tiny random instances of ComfyUI's models, and what has to hold for each family of them."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_detection
import comfy.ops
import comfy.sample
import comfy.sd
import pytest
import torch
from host_kit import dense_calls

from liteattention.host import attach, families
from liteattention.kernels import TILE, tiles
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold, reasons

STEPS = 3
MIN_TOKENS = 128
NO_LAYER, CROSS, NOT_VIDEO, FRAMES = (reason.text for reason in (
    reasons.NO_LAYER, reasons.CROSS_ATTENTION, reasons.NOT_VIDEO, reasons.FRAME_BY_FRAME))
MASKED = "attention mask given"
TOO_SHORT = f"fewer than {MIN_TOKENS} tokens"


@dataclass(frozen=True)
class Case:
    """A tiny model and how its attention calls have to come out.

    Attributes:
        name: family, and what is special here.
        network: "module:class" of the diffusion model in ComfyUI.
        config: the network's arguments; its random state dict is what ComfyUI detects and loads.
        latent: [C, T, H, W] or [C, H, W], or several.
        text: [tokens, width] of the conditioning.
        video: tokens of the latent in a sequence.
        layers: the sparse attention sites: (block, ordinal).
        dense: dense calls of one forward pass, by reason.
        before, after: tokens before and after the video; one of the two says that the sequence may be longer.
        conditions: generator -> the conditioning's other entries.
        resized: whether `config` replaces sizes that ComfyUI's detection has fixed.
        detected: what ComfyUI would detect by a file's metadata or the names of its keys.
        cfg: 1 where a network cannot compute two conditionings at once.
    """

    name: str
    network: str
    config: dict
    latent: tuple
    text: tuple[int, int]
    video: int
    layers: set
    dense: dict = field(default_factory=dict)
    before: int | None = None
    after: int | None = None
    conditions: Callable = lambda generator: {}
    resized: bool = False
    detected: dict = field(default_factory=dict)
    cfg: float = 2.0

    def __str__(self):
        return self.name


def names(kind, count, ordinals=1):
    return {(f"{kind} {i}", o) for i in range(count) for o in range(ordinals)}


def network(path):
    module, name = path.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"{name} is not in this ComfyUI")


def random_state(cls, config, seed=0):
    """A random state dict of a network: norms near 1, matrices that keep the scale."""
    net = cls(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif tensor.dim() > 1:
            state[name] = torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        else:
            noise = 0.02 * torch.randn(tensor.shape, generator=generator)
            state[name] = noise + (1.0 if name.endswith(("weight", "scale")) else 0.0)
    return state


Q_AND_K = (("q", "k"), ("to_q", "to_k"), ("to_q_t", "to_k_t"), ("q_proj", "k_proj"), ("add_q_proj", "add_k_proj"),
           ("to_query", "to_key"), ("norm_q", "norm_k"), ("q_norm", "k_norm"), ("q_norm_x", "k_norm_x"),
           ("q_norm_y", "k_norm_y"), ("ln_q", "ln_k"), ("query_norm", "key_norm"), ("norm_added_q", "norm_added_k"),
           ("img_attn_q_norm", "img_attn_k_norm"), ("q_rms_norm", "k_rms_norm"), ("q_rms_norm_t", "k_rms_norm_t"))
FUSED = ("qkv", "linear1", "qkv_x", "qkv_y", "qkv_proj", "img_attn_qkv")


def align(state, config):
    """Set keys to the queries, so that each token attends to itself most and other tiles can be skipped."""
    width = config.get("dim", 128)  # heads x head_dim
    for name, tensor in list(state.items()):
        parts = name.split(".")
        for q, k in Q_AND_K:
            if q in parts:
                other = ".".join(k if part == q else part for part in parts)
                if other in state and state[other].shape == tensor.shape:
                    state[other] = tensor.clone()
        if parts[-2:-1] and parts[-2] in FUSED:
            tensor[width:2 * width] = tensor[:width]


def load(case):
    """The case's model, as ComfyUI detects and loads it."""
    state = random_state(network(case.network), case.config)
    align(state, case.config)
    detect = comfy.model_detection.detect_unet_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_detection, "detect_unet_config", lambda *args, **kwargs: {
            **(detect(*args, **kwargs) or {}), **(case.config if case.resized else {}), **case.detected})
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})
    assert type(model.model.diffusion_model).__name__ == case.network.split(":")[1], "ComfyUI detects another model"
    return model


def conditioning(case, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, width = case.text
    return [[torch.randn(1, tokens, width, generator=generator), case.conditions(generator)]]


def sample(case, model, steps=STEPS):
    latents = [torch.zeros(1, *shape) for shape in case.latent] if isinstance(case.latent[0], tuple) else \
        [torch.zeros(1, *case.latent)]
    if len(latents) > 1:
        from comfy.nested_tensor import NestedTensor

        latent = NestedTensor(latents)
    else:
        latent, = latents
    with torch.inference_mode():
        out = comfy.sample.sample(model, comfy.sample.prepare_noise(latent, 1), steps, case.cfg, "euler", "simple",
                                  conditioning(case, 2), conditioning(case, 3), latent, seed=1, disable_pbar=True)
    return out.unbind()[0] if getattr(out, "is_nested", False) else out


def run(case, model, threshold, handle=None):
    config = LiteAttentionConfig(rule=Threshold(threshold), min_tokens=MIN_TOKENS, warmup_steps=1)
    return sample(case, attach(model, config, handle=handle or RunHandle()))


def spied_calls(monkeypatch):
    """A list that gets (tokens, must-keep ranges) of every call of the kernel."""
    calls = []
    module = sys.modules["liteattention.runtime.compute"]
    original = module.lite_attention

    def spied(q, k, v, masks, *, must_keep, **kwargs):
        calls.append((q.shape[-2], must_keep))
        return original(q, k, v, masks, must_keep=must_keep, **kwargs)

    monkeypatch.setattr(module, "lite_attention", spied)
    return calls


def kept_ranges(case, seqlen):
    """Token ranges beside the video's, by the case."""
    extra = seqlen - case.video
    if case.before is None and case.after is None:
        assert extra == 0
    before = case.before if case.before is not None else extra - (case.after or 0)
    before = min(before, extra)
    return tuple((a, b) for a, b in ((0, before), (seqlen - (extra - before), seqlen)) if a < b)


def sites(run):
    return {(key.block, key.ordinal) for key, _ in run.passes}


def close(out, expected):
    """Equal within rounding, next to the expected values' range."""
    return (out - expected).abs().max() < 1e-3 * max(1.0, expected.abs().max().item())


def check(case, runs, monkeypatch):
    """Sparse layers, dense calls, must-keep text, and the result, for one tiny model."""
    model = load(case)
    assert families.of(model.model.diffusion_model) is not None
    plain = sample(case, model)
    assert torch.isfinite(plain).all() and plain.std() > 0

    calls, handle = spied_calls(monkeypatch), RunHandle()
    every_tile = run(case, model, -30.0, handle)
    summary = handle.summary
    assert not runs[-1].sparse.failed and not (case.layers and summary.notes)
    assert dense_calls(summary) == {reason: count * summary.forward_passes for reason, count in case.dense.items()}
    assert sites(runs[-1]) == case.layers
    assert all(passes == STEPS for passes in runs[-1].passes.values()), "a mask per layer and row, a pass per step"
    assert summary.sparse_calls == len(case.layers) * summary.forward_passes
    for seqlen, must_keep in calls:
        ranges = kept_ranges(case, seqlen)
        assert (must_keep.keys if must_keep else ()) == ranges == (must_keep.queries if must_keep else ())
    assert close(every_tile, plain)
    if not case.layers:
        return

    handle = RunHandle()
    sparse = run(case, model, 0.0, handle)
    assert torch.isfinite(sparse).all() and handle.summary.skipped > 0
    for seqlen in {seqlen for seqlen, _ in calls}:
        kept = {tile for start, stop in kept_ranges(case, seqlen) for tile in range(start // TILE, -(-stop // TILE))}
        masks = [bits for bits in runs[-1].bits.values() if bits.shape[-1] == tiles(seqlen)]
        assert masks
        for bits in masks:
            for tile in kept:
                assert bits[..., tile].all() and bits[..., tile, :].all(), "text keys and queries stay"
    assert not any(bits.all() for bits in runs[-1].bits.values()), "every layer skips something"
    replaced = model.model_options["transformer_options"].get("patches_replace", {})
    assert not replaced.get("dit") and not any(
        block._forward_pre_hooks for block in model.model.diffusion_model.modules()), "nothing stays on the model"
