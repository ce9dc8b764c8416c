"""Where the attention of a model that Raylight splits over GPUs is taken over.

Raylight's parallel forwards do not call ComfyUI's attention. After xFuser's exchange each GPU has every token of some
of the heads, and computes them by a local attention. It is reached

* by Raylight's own `inner_attention`, where the model's forward passes its transformer_options to it;
* else by the function of xFuser's ring module that gives every local attention. It knows no transformer_options: hooks
  on the model's blocks keep them while a block runs.

No collective runs in either, so every GPU decides for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from ...runtime import AttentionCall, Reason
from ...runtime.compute import is_out_of_memory
from ...runtime.reasons import CAUSAL, CUT_APART, OUT_OF_MEMORY, UNSUPPORTED
from ..attach import KEY, caller

INNER, RING = "raylight.distributed_modules.inner_attention", "xfuser.core.long_ctx_attention.ring.ring_flash_attn"
PASSES_OPTIONS = {"MiniMaxH3Model"}
"""Diffusion models whose parallel forward in Raylight passes its transformer_options to the attention."""

_OPTIONS = "transformer_options"
_SELECT, _CALLER, _PARAMETERS = "select_flash_attn_impl", "xdit_ring_flash_attn_forward", {"stage", "attn_processor"}
_WRAPPED = "lite_attention_wrapped"
_PLAIN = {"dropout_p": (0, None), "window_size": ((-1, -1), None), "alibi_slopes": (None,), "softcap": (0, None)}
_block: ContextVar[Mapping | None] = ContextVar("lite_attention_block", default=None)
"""transformer_options of the block that runs."""


@dataclass(frozen=True)
class Door:
    """Attributes:
        kind: "inner", "ring" or "".
        missing: why there is none; "" where there is one.
        key: of Raylight's inner attention in transformer_options, where this Raylight has one.
    """

    kind: str
    missing: str = ""
    key: str | None = None


def choose(network: torch.nn.Module) -> Door:
    """The door for a diffusion model, after a look at the names and parameters that it relies on."""
    key = getattr(_found(INNER), "INNER_ATTENTION_KEY", None)
    key = key if isinstance(key, str) else None
    if key is not None and type(network).__name__ in PASSES_OPTIONS:
        return Door("inner", key=key)
    ring = _found(RING)
    select, calls = getattr(ring, _SELECT, None), getattr(getattr(ring, _CALLER, None), "__code__", None)
    if not callable(select) or not _PARAMETERS <= inspect.signature(select).parameters.keys():
        return Door("", f"xFuser's ring module has no {_SELECT} as this version of LiteAttention knows it", key)
    if _SELECT not in getattr(calls, "co_names", ()):
        return Door("", f"xFuser's {_CALLER} does not ask {_SELECT} for its attention", key)
    return Door("ring", key=key)


def _found(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return None


def open_ring() -> None:
    """Once per process: local attentions look for the block that they are called from, and do nothing else."""
    ring = import_module(RING)
    original = getattr(ring, _SELECT)
    if hasattr(original, _WRAPPED):
        return

    @wraps(original)
    def select(*args: Any, **kwargs: Any) -> Callable:
        local = original(*args, **kwargs)
        options = _block.get()
        return local if options is None else _taken_over(local, options, _name(*args[:1], *kwargs.values()))

    setattr(select, _WRAPPED, True)
    setattr(ring, _SELECT, select)


def _name(*values: Any) -> str:
    """Display name of the local attention, by xFuser's enumeration among `values`."""
    name = next((value.name for value in values if hasattr(value, "name") and hasattr(value, "value")), None)
    return f"Raylight's {name} attention" if name else "Raylight's attention"


def _taken_over(local: Callable, options: Mapping, dense_by: str) -> Callable:
    @wraps(local)
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        result = _attend(options, q, k, v, kwargs, lambda: local(q, k, v, *args, **kwargs), dense_by)
        if isinstance(result, tuple):
            return result
        # The log-sum-exp is for merging pieces of the keys; there is one piece.
        return result, torch.zeros((), dtype=torch.float32, device=q.device).expand(q.shape[0], q.shape[2], q.shape[1])

    return attention


@contextmanager
def blocks_known(network: torch.nn.Module) -> Iterator[None]:
    """While open, local attentions find the transformer_options of the block that runs."""
    lists = [child for child in network.children() if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict))]
    with ExitStack() as hooks:
        for block in (block for blocks in lists for block in blocks.children()):
            hooks.callback(block.register_forward_pre_hook(_enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(_leave, always_call=True).remove)
        yield


def _enter(block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    if not torch.compiler.is_compiling():  # traced once for all blocks
        _block.set(kwargs.get(_OPTIONS))


def _leave(block: torch.nn.Module, args: tuple, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _block.set(None)


class InnerAttention:
    """A processor for Raylight's `inner_attention`."""

    supports_ring = False

    def __call__(self, dense: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                 transformer_options: Mapping, **kwargs: Any) -> Any:
        return _attend(transformer_options, q, k, v, kwargs, lambda: dense(q, k, v, **kwargs),
                       _name(kwargs.get("attn_type")))


class _Dense:
    """The local attention underneath, as a fallback that is called once."""

    def __init__(self, local: Callable[[], Any]):
        self._local = local
        self.called = False
        self.result: Any = None

    def __call__(self) -> torch.Tensor:
        self.called = True
        self.result = self._local()
        out = self.result[0] if isinstance(self.result, tuple) else self.result
        return out.transpose(1, 2)


def _attend(options: Mapping, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keywords: Mapping,
            local: Callable[[], Any], dense_by: str) -> Any:
    """[B, N, H, D] from the sparse kernel, or what `local` gives, as it is. Raises what `local` raises."""
    run, forward_pass, layer = caller(options)
    if forward_pass is None:
        return local()
    dense, reason = _Dense(local), options[KEY].share.stays_dense or _unsupported(keywords)
    if reason is None:
        call = AttentionCall.from_hook(*(x.transpose(1, 2) for x in (q, k, v)), q.shape[2], skip_reshape=True,
                                       skip_output_reshape=True, scale=keywords.get("softmax_scale"))
        try:
            out = forward_pass.attend(call, layer, dense, dense_by)
            return dense.result if dense.called else out.transpose(1, 2)
        except Exception as error:
            if dense.called or not is_out_of_memory(error):
                raise
        # The other GPUs wait for this one: an error here would end the run for all of them, a minute later.
        run.sparse.run_out()
        reason = OUT_OF_MEMORY
    forward_pass.decline(reason, dense, dense_by)
    return dense.result


def _unsupported(keywords: Mapping) -> Reason | None:
    """Why a local attention with these arguments is no plain self-attention, or None."""
    if keywords.get("causal"):
        return CAUSAL
    if keywords.get("joint_tensor_key") is not None:
        return CUT_APART
    special = any(name in keywords and keywords[name] not in plain for name, plain in _PLAIN.items())
    return UNSUPPORTED if special else None
