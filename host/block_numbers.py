"""Block numbers for models that give none: three ways to get them into the `transformer_options` of the blocks.

Each way is a context around one call of the model and leaves nothing on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch

OPTIONS = "transformer_options"


class Numbering(Protocol):
    def numbered(self, module: torch.nn.Module, options: dict) -> AbstractContextManager[dict]:
        """The options for one call of `module`, whose blocks have numbers while the context is open. `options` itself
        is not changed."""


@dataclass(frozen=True)
class BlockPatches:
    """For a model with ComfyUI's block replacement, `patches_replace["dit"]`.

    The model hands each replaced block its arguments and `transformer_options`; the number is added there, and the
    block, or another replacement of it, is called as before. Holds under torch.compile: numbers are constants of the
    call site, not read from a state.

    Attributes:
        blocks: the attribute with the model's list of blocks.
    """

    blocks: str

    @contextmanager
    def numbered(self, module: torch.nn.Module, options: dict) -> Iterator[dict]:
        replaced = options.get("patches_replace") or {}
        dit = dict(replaced.get("dit") or {})
        total = len(getattr(module, self.blocks, ()))
        for index in range(total):
            key = ("double_block", index)
            patch = _numbering_patch(index, total)
            dit[key] = partial(patch, replacement=dit[key]) if key in dit else patch
        yield {**options, "patches_replace": {**replaced, "dit": dit}}


@dataclass(frozen=True)
class BlockHooks:
    """For a model without block replacement: forward hooks on its blocks.

    Under torch.compile hooks are traced once for all blocks. There they add nothing, and the calls stay dense.

    Attributes:
        stacks: (block type, attribute with the list of blocks) for each stack of blocks.
    """

    stacks: tuple[tuple[str, str], ...]

    @contextmanager
    def numbered(self, module: torch.nn.Module, options: dict) -> Iterator[dict]:
        with ExitStack() as hooks:
            for kind, attribute in self.stacks:
                blocks = getattr(module, attribute, ())
                for index, block in enumerate(blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else blocks):
                    _hook(hooks, block, _numbering_hook(kind, index, len(blocks)))
            yield options


@dataclass(frozen=True)
class ForeignForward:
    """For a model that numbers its blocks itself, where a node (TeaCache) has replaced its forward with one that calls
    the blocks without `transformer_options`: hooks supply them.

    Attributes:
        kind: block type.
        blocks: the attribute with the model's list of blocks.
    """

    kind: str
    blocks: str

    @contextmanager
    def numbered(self, module: torch.nn.Module, options: dict) -> Iterator[dict]:
        with ExitStack() as hooks:
            blocks = getattr(module, self.blocks, ()) if {"forward", "forward_orig"} & vars(module).keys() else ()
            for index, block in enumerate(blocks):
                if OPTIONS in inspect.signature(block.forward).parameters:
                    given = {**options, **_number(self.kind, index, len(blocks))}
                    _hook(hooks, block, partial(_supply, given))
            yield options


def _number(kind: str, index: int, total: int) -> dict:
    return {"block_type": kind, "block_index": index, "total_blocks": total}


@cache
def _numbering_patch(index: int, total: int) -> Callable:
    """A block replacement. The same object for every call: a compiled model that gets a new one compiles again."""
    number = _number("double", index, total)

    def numbered_block(args: dict, extra: dict, replacement: Callable | None = None) -> dict:
        args = {**args, OPTIONS: {**args[OPTIONS], **number}}
        return extra["original_block"](args) if replacement is None else replacement(args, extra)

    return numbered_block


@cache
def _numbering_hook(kind: str, index: int, total: int) -> Callable:
    number = _number(kind, index, total)

    def number_block(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling() or kwargs.get(OPTIONS) is None:
            return None
        return args, {**kwargs, OPTIONS: {**kwargs[OPTIONS], **number}}

    return number_block


def _supply(options: dict, block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if torch.compiler.is_compiling() or kwargs.get(OPTIONS):
        return None
    return args, {**kwargs, OPTIONS: options}


def _hook(hooks: ExitStack, block: torch.nn.Module, hook: Callable) -> None:
    hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
