"""Calls whose q, k, v arrive in single-owner containers (ComfyUI from 0.33 on, MiniMax H3).

An attention that takes a container may free its tensor as soon as it has made something smaller of it. An override
without an entry for containers gets plain tensors, which its callers hold until it returns: that raises the peak of
memory of dense calls, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import torch

ENTRY = "container_function"


def fallback_with_containers(fallback: Callable | None, q: Any, k: Any, v: Any, heads: int,
                             arguments: dict) -> torch.Tensor:
    """The fallback attention of q, k, v in containers; it gets the containers where it has an entry for them.

    Args:
        fallback: the override found on the model; None: ComfyUI's attention.
        arguments: of the call, `_inside_attn_wrapper` included, without which ComfyUI's attention calls the override
            again.
    """
    if fallback is None:
        return attention.optimized_attention(q, k, v, heads, **arguments)
    if hasattr(fallback, ENTRY):
        return getattr(fallback, ENTRY)(q, k, v, heads, **arguments)
    plain = getattr(attention.optimized_attention, "__wrapped__", attention.optimized_attention)
    return fallback(plain, q.take(), k.take(), v.take(), heads, **arguments)


def empty(*containers: Any) -> None:
    """Free the tensors that are still in them: the model holds its containers longer than it needs their tensors."""
    for container in containers:
        if container.tensor is not None:
            container.take()
