"""Attentions that a checkpoint has chosen for its layers (ComfyUI from 0.38 on).

The module of such a layer holds its attention and hands it to each call. ComfyUI drops it as soon as an override is on
the model, whatever that override computes. Dense calls ask here for the attention that the call would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

HOLDER = "comfy_attention"
"""Attribute of a layer's module, by which checkpoints name it, too; its `function` is None where nothing is chosen."""
KEY = "lite_attention_chosen"


def chosen(network: torch.nn.Module | None) -> list[Callable]:
    """The different attentions that the layers of a network have chosen; most networks have none."""
    return list(dict.fromkeys(filter(None, (_function(module) for module in _holders(network)))))


@contextmanager
def followed(network: torch.nn.Module | None, options: dict) -> Iterator[dict]:
    """`options` for one call of `network`; while the context is open `current` tells from them what has been chosen.

    Compiled, the hooks do nothing: dense calls get ComfyUI's attention there.
    """
    if not chosen(network):
        yield options
        return
    entered: list[Callable | None] = []
    with ExitStack() as hooks:
        for module in _holders(network):
            hooks.callback(module.register_forward_pre_hook(partial(_enter, entered)).remove)
            hooks.callback(module.register_forward_hook(partial(_leave, entered)).remove)
        yield {**options, KEY: entered}


def current(options: Mapping) -> Callable | None:
    """The attention that the layer which is computing has chosen, or None."""
    entered = options.get(KEY)
    return entered[-1] if entered else None


def _holders(network: torch.nn.Module | None) -> list[torch.nn.Module]:
    modules = network.modules() if isinstance(network, torch.nn.Module) else ()
    return [module for module in modules if HOLDER in module._modules]


def _function(module: torch.nn.Module) -> Callable | None:
    return getattr(getattr(module, HOLDER), "function", None)


def _enter(entered: list, module: torch.nn.Module, args: tuple) -> None:
    if not torch.compiler.is_compiling():
        entered.append(_function(module))


def _leave(entered: list, module: torch.nn.Module, args: tuple, out: object) -> None:
    if not torch.compiler.is_compiling() and entered:
        entered.pop()
