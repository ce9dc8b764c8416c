"""Calls whose q, k, v arrive in single-owner containers (ComfyUI from 0.33 on, MiniMax H3).

An attention that takes a container may free its tensor as soon as it has made something smaller of it. An override
without an entry for containers gets plain tensors, which its callers hold until it returns: the peak of memory rises
for the calls that it leaves, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import torch

ENTRY = "container_function"


def previous_with_containers(previous: Callable | None, q: Any, k: Any, v: Any, heads: int,
                             arguments: dict) -> torch.Tensor:
    """What the attention before us makes of q, k, v in containers; it takes them itself where it can.

    Args:
        arguments: of the call, `_inside_attn_wrapper` included, without which ComfyUI's attention comes back to us.
    """
    if previous is None:
        return attention.optimized_attention(q, k, v, heads, **arguments)
    if hasattr(previous, ENTRY):
        return getattr(previous, ENTRY)(q, k, v, heads, **arguments)
    plain = getattr(attention.optimized_attention, "__wrapped__", attention.optimized_attention)
    return previous(plain, q.take(), k.take(), v.take(), heads, **arguments)


def empty(*containers: Any) -> None:
    """Let go of what is still in them: the model holds them for longer than it needs what they hold."""
    for container in containers:
        if container.tensor is not None:
            container.take()
