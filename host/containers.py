"""Calls whose q, k, v arrive in single-owner containers (MiniMax H3 from ComfyUI 0.33 on, every model from 0.40 on).

An attention that takes a container may free its tensor as soon as it has made something smaller of it. An override
with an entry for containers gets them, but not the function that the model called. One without an entry gets plain
tensors and that function; the caller holds the tensors until it returns. So the override has the entry where an
attention of its dense calls could free them, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .compat import core

ENTRY = "container_function"


def core_attention() -> Callable:
    return core("comfy.ldm.modules.attention:optimized_attention")


def useful(fallback: Callable | None, chosen: Sequence[Callable]) -> bool:
    """Whether an attention of dense calls takes containers.

    Args:
        fallback: the override found on the model, or None.
        chosen: attentions that the checkpoint has chosen for layers of the model.
    """
    if fallback is not None:
        return hasattr(fallback, ENTRY)
    return bool(chosen) or getattr(core_attention(), ENTRY, None) is not None


def fallback_with_containers(fallback: Callable | None, chosen: Callable | None, q: Any, k: Any, v: Any, heads: int,
                             arguments: dict) -> torch.Tensor:
    """The fallback attention of q, k, v in containers, where they are `useful`.

    Args:
        fallback: the override found on the model, with an entry for them; None: the attention that the layer has
            chosen, or ComfyUI's.
        arguments: of the call, `_inside_attn_wrapper` included, without which ComfyUI's attention calls the override
            again.
    """
    if fallback is None:
        return (chosen or core_attention())(q, k, v, heads, **arguments)
    return getattr(fallback, ENTRY)(q, k, v, heads, **arguments)


def empty(*containers: Any) -> None:
    """Free the tensors that are still in them: the model holds its containers longer than it needs their tensors."""
    for container in containers:
        if container.tensor is not None:
            container.take()
