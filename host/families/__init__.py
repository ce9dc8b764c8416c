"""The families of models that are known. Adding one is adding a module here with a `FAMILIES` tuple, and its test.

A model of no family goes by the rule that holds for all: the model numbers its blocks itself, its patch size says how
many tokens the latent makes, and as many tokens at both ends of the sequence are must-keep as it is longer than that.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ...runtime.policy import VideoTokens
from .. import model_call
from .family import Family, ModelCall


@cache
def known() -> tuple[Family, ...]:
    """Every declared family, in the order of the modules' names."""
    modules = (importlib.import_module(f".{found.name}", __name__) for found in pkgutil.iter_modules(__path__))
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


@cache
def _by_class() -> dict[str, Family]:
    return {name: family for family in known() for name in family.models}


def of(module: torch.nn.Module | None) -> Family | None:
    """The family of a diffusion model, by the name of its class (torch.compile puts its own around it), or None."""
    return _by_class().get(type(getattr(module, "_orig_mod", module)).__name__)


def video_tokens(module: torch.nn.Module | None, shape: tuple[int, ...], context: torch.Tensor | None,
                 conditions: Mapping[str, Any], options: Mapping[str, Any]) -> VideoTokens | int | None:
    """The video's tokens in a call of `module`, or None if that cannot be told.

    Args:
        shape: of what the sampler hands over; several latents come as one, with `latent_shapes` among the conditions.
        context: the text conditioning, [B, L, D].
    """
    shapes = conditions.get("latent_shapes") or [shape]
    family = of(module)
    if family is None:
        return model_call.latent_tokens(shape, getattr(module, "patch_size", None), len(shapes))
    module = getattr(module, "_orig_mod", module)
    return family.video_tokens(ModelCall(module, tuple(shapes[0]), context, conditions, options))


@contextmanager
def numbered(module: torch.nn.Module | None, options: dict) -> Iterator[dict]:
    """`options` for one call of `module`, which numbers its blocks while the context is open."""
    family = of(module)
    if family is None or family.numbering is None:
        yield options
        return
    with family.numbering.numbered(getattr(module, "_orig_mod", module), options) as counted:
        yield counted


__all__ = ["Family", "ModelCall", "known", "numbered", "of", "video_tokens"]
