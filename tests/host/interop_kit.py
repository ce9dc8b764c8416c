"""What has to hold with another node on the model, and pieces that the tests of interop share."""

import importlib
from unittest import mock

import comfy.samplers
import pytest
import torch
from host_kit import SIZE

from liteattention.runtime import RunHandle, Threshold

ORDERS = ["other node first", "other node last"]
_ALONE = {}
"""Runs of the other nodes without LiteAttention, which both orders are compared to."""
SMALL = (5, 16, 16)
"""Latent frames, height, width: 320 tokens, 3 x 3 tiles."""
STEPS = 3


def node(module, name):
    """A node class of ComfyUI; skips where this ComfyUI does not have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI has no {name}")


def in_order(kit, order, other, handle=None, **settings):
    """The tiny model with LiteAttention and another node (model -> model), either one first."""
    if order == "other node first":
        return kit.lite(other(kit.model), handle, **settings)
    return other(kit.lite(handle=handle, **settings))


def plain(kit):
    """The run of `check_dense_runs` with no other node at all."""
    if None not in _ALONE:
        _ALONE[None] = kit.sample(kit.model, STEPS, size=SMALL)
    return _ALONE[None]


def check_dense_runs(kit, order, other, sample=None, tolerance=1e-3):
    """With every call dense the run is, bit by bit, that without LiteAttention; with every tile computed by the sparse
    kernel it is the same within rounding. Returns the run without LiteAttention."""
    sample = sample or (lambda model: kit.sample(model, STEPS, size=SMALL))
    if other not in _ALONE:
        _ALONE[other] = sample(other(kit.model))
    alone = _ALONE[other]
    assert torch.isfinite(alone).all()
    assert torch.equal(sample(in_order(kit, order, other, dense_blocks="0--1")), alone)
    handle = RunHandle()
    every_tile = sample(in_order(kit, order, other, handle, rule=Threshold(-30.0)))
    assert handle.summary.sparse_calls > 0 and not handle.summary.notes
    assert (every_tile - alone).abs().max() < tolerance * max(1.0, alone.abs().max().item())
    return alone


def rows_of(run):
    return {row for _, row in run.passes}


def sample_with(kit, guider, size=SIZE, steps=STEPS, sampler="euler", model=None):
    """SamplerCustomAdvanced with a guider; the latent."""
    from comfy_extras.nodes_custom_sampler import BasicScheduler, RandomNoise, SamplerCustomAdvanced

    sigmas = BasicScheduler.execute(model or kit.model, "simple", steps, 1.0).args[0]
    with torch.inference_mode():
        return SamplerCustomAdvanced.execute(
            RandomNoise.execute(1).args[0], guider, comfy.samplers.sampler_object(sampler), sigmas,
            {"samples": kit.latent(size=size)}).args[0]["samples"]


def without_options(model):
    """What TeaCache does to Wan: during a call another `forward_orig`, which runs the blocks without
    `transformer_options`."""
    patched = model.clone()
    network = model.get_model_object("diffusion_model")
    blocks = list(network.blocks)

    def without(block):
        return lambda *args, transformer_options=None, **kwargs: block(*args, **kwargs)

    def forward_orig(*args, **kwargs):
        object.__setattr__(network, "blocks", [without(block) for block in blocks])
        try:
            return type(network).forward_orig(network, *args, **kwargs)
        finally:
            object.__delattr__(network, "blocks")

    def wrapper(model_function, arguments):
        with mock.patch.multiple(network, forward_orig=forward_orig):
            return model_function(arguments["input"], arguments["timestep"], **arguments["c"])

    patched.set_model_unet_function_wrapper(wrapper)
    return patched
