"""What a family of models declares, and how that is applied to a model call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ...runtime.policy import VideoTokens
from .. import model_call

OPTIONS = "transformer_options"


class ModelCall(NamedTuple):
    """One call of a diffusion model, as its family's declarations see it.

    Attributes:
        module: the diffusion model.
        shape: of the video's (or image's) latent, [B, C, T, H, W] or [B, C, H, W].
        context: the text conditioning, [B, L, D], or None.
        conditions: the model's other inputs by name.
        options: the call's transformer_options.
    """

    module: torch.nn.Module
    shape: tuple[int, ...]
    context: torch.Tensor | None
    conditions: Mapping[str, Any]
    options: Mapping[str, Any]


def nothing(call: ModelCall) -> int | None:
    """No tokens."""
    return 0


def unknown(call: ModelCall) -> int | None:
    """Not known."""
    return None


def text(call: ModelCall) -> int | None:
    """Tokens of the text. Not known where a patch may add to them."""
    if call.context is None or "post_input" in call.options.get("patches", ()):
        return None
    return call.context.shape[1]


@dataclass(frozen=True)
class BlockPatches:
    """Block numbers for a model that gives none but has ComfyUI's block replacement, `patches_replace["dit"]`.

    The model hands each replaced block its arguments and `transformer_options`; the number is added there and the
    block, or whatever else replaces it, is called as before. Holds under torch.compile: numbers are constants of the
    call site, not read from a state.

    Attributes:
        blocks: the attribute with the model's list of blocks.
    """

    blocks: str

    @contextmanager
    def numbered(self, module: torch.nn.Module, options: dict) -> Iterator[dict]:
        """`options` for one call of `module`, with the numbers coming in. Those given are not changed."""
        replaced = options.get("patches_replace") or {}
        dit = dict(replaced.get("dit") or {})
        total = len(getattr(module, self.blocks, ()))
        for index in range(total):
            key = ("double_block", index)
            patch = _numbering_patch(index, total)
            dit[key] = partial(patch, replacement=dit[key]) if key in dit else patch
        yield {**options, "patches_replace": {**replaced, "dit": dit}}


@cache
def _numbering_patch(index: int, total: int) -> Callable:
    """A block replacement. The same one for every call, so that a compiled model has nothing new to look at."""
    ids = {"block_type": "double", "block_index": index, "total_blocks": total}

    def numbered_block(args: dict, extra: dict, replacement: Callable | None = None) -> dict:
        args = {**args, OPTIONS: {**args[OPTIONS], **ids}}
        return extra["original_block"](args) if replacement is None else replacement(args, extra)

    return numbered_block


@dataclass(frozen=True)
class BlockHooks:
    """Block numbers for a model that has no block replacement either: hooks on its blocks, for the length of the call.

    A hook adds the number to the `transformer_options` that its block is called with; nothing is kept. Under
    torch.compile hooks are traced once for all blocks, so there they add nothing and the calls are left.

    Attributes:
        stacks: (block type, attribute with the list of blocks) for each stack of blocks.
    """

    stacks: tuple[tuple[str, str], ...]

    @contextmanager
    def numbered(self, module: torch.nn.Module, options: dict) -> Iterator[dict]:
        """`options`, unchanged; the numbers come in while the context is open."""
        with ExitStack() as hooks:
            for kind, attribute in self.stacks:
                blocks = getattr(module, attribute, ())
                for index, block in enumerate(blocks):
                    hook = _numbering_hook(kind, index, len(blocks))
                    hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield options


@cache
def _numbering_hook(kind: str, index: int, total: int) -> Callable:
    ids = {"block_type": kind, "block_index": index, "total_blocks": total}

    def number_block(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling() or kwargs.get(OPTIONS) is None:
            return None
        return args, {**kwargs, OPTIONS: {**kwargs[OPTIONS], **ids}}

    return number_block


@dataclass(frozen=True)
class ForeignForward:
    """For a model that numbers its blocks itself, where a node has put another forward in its place (TeaCache) that
    calls them without `transformer_options`: hooks supply them for the length of the call.

    Attributes:
        kind, blocks: as in `BlockHooks`.
    """

    kind: str
    blocks: str

    @contextmanager
    def numbered(self, module: torch.nn.Module, options: dict) -> Iterator[dict]:
        """`options`, unchanged; the blocks get them while the context is open."""
        with ExitStack() as hooks:
            blocks = getattr(module, self.blocks, ()) if {"forward", "forward_orig"} & vars(module).keys() else ()
            for index, block in enumerate(blocks):
                if OPTIONS in inspect.signature(block.forward).parameters:
                    ids = {"block_type": self.kind, "block_index": index, "total_blocks": len(blocks)}
                    hook = partial(_supply, {**options, **ids})
                    hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield options


def _supply(options: dict, block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if torch.compiler.is_compiling() or kwargs.get(OPTIONS):
        return None
    return args, {**kwargs, OPTIONS: options}


@dataclass(frozen=True)
class Family:
    """Where a family of models has its video (or image) tokens, and how its attention layers are told apart.

    Attributes:
        name: as in the table of docs/models.md.
        models: class names of the diffusion models.
        text: how the text comes in, for the table.
        front, behind: tokens before and after the video's; one of the two is enough. All of them are must-keep.
        patch: the patch size of a diffusion model: an int or (t, h, w).
        dropped: tokens of the latent that the model leaves out.
        numbering: who numbers the blocks; None: the model.
        width: heads x head_dim of the video's attentions, where others could be taken for them.
        left: kinds of calls that are left to the previous attention, for the table.
    """

    name: str
    models: tuple[str, ...]
    text: str
    front: Callable[[ModelCall], int | None] = unknown
    behind: Callable[[ModelCall], int | None] = unknown
    patch: Callable[[torch.nn.Module], object] = attrgetter("patch_size")
    dropped: Callable[[ModelCall], int | None] = nothing
    numbering: BlockPatches | BlockHooks | ForeignForward | None = None
    width: Callable[[torch.nn.Module], int | None] = lambda module: None
    left: tuple[str, ...] = ()

    def video_tokens(self, call: ModelCall) -> VideoTokens | None:
        """What the family knows about the tokens of a call, or None if that is nothing."""
        count = model_call.latent_tokens(call.shape, self.patch(call.module))
        if count is None:
            return None
        return VideoTokens(count - self.dropped(call), self.front(call), self.behind(call), self.width(call.module))
