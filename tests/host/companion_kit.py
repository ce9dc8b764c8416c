"""What has to hold with another node on the model, and pieces that the tests of companion nodes share."""

import importlib

import comfy.samplers
import pytest
import torch
from host_kit import SIZE

from liteattention.runtime import RunHandle

ORDERS = ["companion first", "companion last"]
_ALONE = {}
"""Runs of companions without LiteAttention, which both orders are compared to."""
SMALL = (5, 16, 16)
"""Latent frames, height, width: 320 tokens, 3 x 3 tiles."""
STEPS = 3


def node(module, name):
    """A node class of ComfyUI; skips where this ComfyUI does not have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI has no {name}")


def in_order(kit, order, companion, handle=None, **settings):
    """The tiny model with LiteAttention and a companion (model -> model), either one first."""
    if order == "companion first":
        return kit.lite(companion(kit.model), handle, **settings)
    return companion(kit.lite(handle=handle, **settings))


def plain(kit):
    """The run of `check_left_and_dense` with no other node at all."""
    if None not in _ALONE:
        _ALONE[None] = kit.sample(kit.model, STEPS, size=SMALL)
    return _ALONE[None]


def check_left_and_dense(kit, order, companion, sample=None, tolerance=1e-3):
    """With every call left the run is, bit by bit, the one without LiteAttention; with every tile kept it is that
    within rounding. Returns that run."""
    sample = sample or (lambda model: kit.sample(model, STEPS, size=SMALL))
    if companion not in _ALONE:
        _ALONE[companion] = sample(companion(kit.model))
    alone = _ALONE[companion]
    assert torch.isfinite(alone).all()
    assert torch.equal(sample(in_order(kit, order, companion, dense_blocks="0--1")), alone)
    handle = RunHandle()
    dense = sample(in_order(kit, order, companion, handle, threshold=-30.0))
    assert handle.receipt.taken > 0 and not handle.receipt.notes
    assert (dense - alone).abs().max() < tolerance * max(1.0, alone.abs().max().item())
    return alone


def rows_of(session):
    return {row for _, row in session.passes}


def sample_with(kit, guider, size=SIZE, steps=STEPS, sampler="euler", model=None):
    """SamplerCustomAdvanced with a guider; the latent."""
    from comfy_extras.nodes_custom_sampler import BasicScheduler, RandomNoise, SamplerCustomAdvanced

    sigmas = BasicScheduler.execute(model or kit.model, "simple", steps, 1.0).args[0]
    with torch.inference_mode():
        return SamplerCustomAdvanced.execute(
            RandomNoise.execute(1).args[0], guider, comfy.samplers.sampler_object(sampler), sigmas,
            {"samples": kit.latent(size=size)}).args[0]["samples"]
