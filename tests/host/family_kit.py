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

from liteattention.host import attach, families
from liteattention.kernels import TILE, tiles
from liteattention.runtime import LiteAttentionConfig, RunHandle, policy

STEPS = 3
MIN_TOKENS = 128
NO_LAYER, CROSS, NOT_VIDEO = policy.NO_LAYER, policy.CROSS_ATTENTION, policy.NOT_VIDEO
MASKED = "attention mask given"
TOO_SHORT = f"fewer than {MIN_TOKENS} tokens"


@dataclass(frozen=True)
class Case:
    """A tiny model and what its attention calls have to come to.

    Attributes:
        family: name of the family.
        network: "module:class" of the diffusion model in ComfyUI.
        config: the network's arguments; its random state dict is what ComfyUI detects and loads.
        latent: [C, T, H, W] or [C, H, W], or several.
        text: [tokens, width] of the conditioning, and `conditions(generator)` its other entries.
        width: heads x head_dim.
        video: tokens of the latent in a sequence.
        layers: the attention sites that are taken: (name, ordinal).
        left: calls that are left in one evaluation, by reason.
        front: tokens before the video, where the sequence is longer; None: all that are not behind it.
        behind: tokens after the video; None: all that are not before it. Both None: the sequence is the video.
        sizes: what replaces fixed sizes in the configuration that ComfyUI detects.
        what: what the case covers, for the table.
    """

    family: str
    network: str
    config: dict
    latent: tuple
    text: tuple[int, int]
    width: int
    video: int
    layers: set
    left: dict = field(default_factory=dict)
    front: int | None = None
    behind: int | None = None
    conditions: Callable = lambda generator: {}
    sizes: dict = field(default_factory=dict)
    metadata: dict | None = None
    edit: Callable = lambda state: None
    options: dict = field(default_factory=dict)
    cfg: float = 2.0
    tolerance: float = 1e-3
    what: str = ""

    def __str__(self):
        return self.what or self.family


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
           ("q_rms_norm", "k_rms_norm"), ("q_rms_norm_t", "k_rms_norm_t"))
FUSED = ("qkv", "linear1", "qkv_x", "qkv_y", "qkv_proj")


def align(state, width):
    """Make keys what the queries are, so that each token attends to itself most and other tiles can go."""
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
    align(state, case.width)
    case.edit(state)
    detect = comfy.model_detection.detect_unet_config
    with pytest.MonkeyPatch.context() as patch:
        if case.sizes:
            patch.setattr(comfy.model_detection, "detect_unet_config",
                          lambda *args, **kwargs: {**detect(*args, **kwargs), **case.sizes})
        keywords = {} if case.metadata is None else {"metadata": case.metadata}
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32}, **keywords)
    module = model.model.diffusion_model
    assert type(module).__name__ == case.network.split(":")[1], "ComfyUI takes it for another model"
    model.model_options["transformer_options"].update(case.options)
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
    config = LiteAttentionConfig(threshold=threshold, min_tokens=MIN_TOKENS, warmup_steps=1)
    return sample(case, attach(model, config, handle=handle or RunHandle()))


def spied_calls(monkeypatch):
    """A list that gets (tokens, must-keep ranges) of every call of the kernel."""
    calls = []
    module = sys.modules["liteattention.runtime.evaluation"]
    original = module.lite_attention

    def spied(q, k, v, masks, *, heads, must_keep, **kwargs):
        seqlen = q.shape[-2]
        calls.append((seqlen, must_keep))
        return original(q, k, v, masks, heads=heads, must_keep=must_keep, **kwargs)

    monkeypatch.setattr(module, "lite_attention", spied)
    return calls


def kept_ranges(case, seqlen):
    """Token ranges that are not the video's, by the case."""
    extra = seqlen - case.video
    if case.front is None and case.behind is None:
        assert extra == 0
    front = case.front if case.front is not None else extra - (case.behind or 0)
    front = min(front, extra)
    return tuple((a, b) for a, b in ((0, front), (seqlen - (extra - front), seqlen)) if a < b)


def check(case, sessions, monkeypatch):
    """Layers, calls that are left, text that stays, and the result, for one tiny model."""
    model = load(case)
    family = families.of(model.model.diffusion_model)
    assert family is not None and family.name == case.family
    plain = sample(case, model)
    assert torch.isfinite(plain).all() and plain.std() > 0

    calls, handle = spied_calls(monkeypatch), RunHandle()
    dense = run(case, model, -30.0, handle)
    session, receipt = sessions[-1], handle.receipt
    assert not session.failed and not (case.layers and receipt.notes)
    assert receipt.left == {reason: count * receipt.evaluations for reason, count in case.left.items()}
    assert {(key.name, key.ordinal) for key, _ in session.passes} == case.layers
    assert all(passes == STEPS for passes in session.passes.values()), "a mask per layer and row, a pass per evaluation"
    assert receipt.taken == len(case.layers) * receipt.evaluations
    for seqlen, must_keep in calls:
        ranges = kept_ranges(case, seqlen)
        assert (must_keep.keys if must_keep else ()) == ranges == (must_keep.queries if must_keep else ())
    assert (dense - plain).abs().max() < case.tolerance * max(1.0, plain.abs().max().item())
    if not case.layers:
        return

    handle = RunHandle()
    sparse = run(case, model, 0.0, handle)
    assert torch.isfinite(sparse).all() and handle.receipt.skipped > 0
    for seqlen in {seqlen for seqlen, _ in calls}:
        kept = {tile for start, stop in kept_ranges(case, seqlen) for tile in range(start // TILE, -(-stop // TILE))}
        masks = [bits for bits in sessions[-1].bits.values() if bits.shape[-1] == tiles(seqlen)]
        assert masks
        for bits in masks:
            for tile in kept:
                assert bits[..., tile].all() and bits[..., tile, :].all(), "text keys and queries stay"
    assert not any(bits.all() for bits in sessions[-1].bits.values()), "every layer skips something"
    replaced = model.model_options["transformer_options"].get("patches_replace", {})
    assert not replaced.get("dit") and not any(
        block._forward_pre_hooks for block in model.model.diffusion_model.modules()), "nothing of ours stays"
    return model

