"""What other nodes on a model mean for it: those that cannot share it, attention they take away, calls they repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP

from ..runtime import policy

OVERRIDE = "optimized_attention_override"
_SPARSE_MODULE = "comfy_extras.nodes_sparse_attention"
_SPARSE_KEY = "block_sparse_attention"
SPARSE_ON_TOP = "Model Sparse Attention has the attention"
SPARSE_NOTE = ("Model Sparse Attention, applied after this node, has the attention; LiteAttention leaves every call. "
               "Remove one of the two nodes")

FULLGRAPH_NOTE = ("torch.compile is set to fullgraph, and attention that keeps masks cannot be part of a graph; "
                  "LiteAttention does nothing in this run. Turn fullgraph off")


def compiled_as_one_graph(model_options: Mapping) -> bool:
    """Whether a compile node forbids graph breaks: our attention is one, and the run would end with an error."""
    return bool((model_options.get("torch_compile_kwargs") or {}).get("fullgraph"))


def take_off(transformer_options: dict, previous: str) -> None:
    """Put the attention that was there before ours back, where ours is called first.

    Args:
        previous: the attribute of our override that holds it.
    """
    current = transformer_options.get(OVERRIDE)
    if hasattr(current, previous):
        transformer_options[OVERRIDE] = getattr(current, previous)
        if transformer_options[OVERRIDE] is None:
            del transformer_options[OVERRIDE]


def refuse_sparse(model: Any, previous: Callable | None) -> None:
    """Before LiteAttention goes on `model` (ModelPatcher), whose attention override is `previous`.

    Core's Model Sparse Attention puts its override on top again at every evaluation, also over a node after it, so
    the override that is there now does not tell.

    Raises:
        ValueError: `model` has Model Sparse Attention.
    """
    callbacks = model.callbacks.get(CallbacksMP.ON_PREPARE_STATE) or {}
    if getattr(previous, "__module__", "") == _SPARSE_MODULE or _SPARSE_KEY in callbacks:
        raise ValueError("model already has Model Sparse Attention; two sparse attentions cannot share a model. "
                         "Remove one of the two nodes.")


def sparse_on_top(options: Mapping) -> bool:
    """Whether Model Sparse Attention sees the attention calls of a model call with these transformer_options first."""
    return getattr(options.get(OVERRIDE), "__module__", "") == _SPARSE_MODULE


def bypass_note(model: Any, taken: int, left: Mapping[str, int]) -> str | None:
    """What to say after a run in which no self-attention came by, or None.

    Args:
        model: the ModelPatcher of the run.
        taken, left: calls, those left by reason.
    """
    if taken or set(left) != {policy.CROSS_ATTENTION}:
        return None
    patched = [name for name in getattr(model, "object_patches", ()) if name.endswith("attn.forward")]
    by = (f"a node has replaced {patched[0]} and {len(patched) - 1} more; remove it, or this one" if patched
          else "the model, or a node, computes it in another way")
    return f"no self-attention reached LiteAttention: {by}"


class Repeats:
    """How often each row has been evaluated in the present call that the sampler made of the model.

    Nodes that cut a latent into tiles evaluate every tile with the same conditionings, and guiders may add passes of
    their own. Each of them is another image: it has masks of its own, found again by its place in the order.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[torch.Tensor, Counter]] = {}

    def number(self, model: Hashable, window: Hashable, rows: Sequence[Hashable] | None, options: Mapping) -> int:
        """How often one of `rows` came before, within this call of the sampler; counts them.

        Args:
            model: identity of the network; one thread evaluates it.
            window: identity of the context window, or None.
            rows: as `row_names` gives them.
            options: the transformer_options of the call.
        """
        sigmas = options.get("sigmas")
        if sigmas is None or not rows:
            return 0
        # All calls that come of one call by the sampler have the very tensor; looking at its value would wait for the
        # device, and a sampler may come back to a noise level.
        last, counts = self._last.get(model, (None, None))
        if last is not sigmas:
            counts = Counter()
            self._last[model] = sigmas, counts
        number = max(counts[window, row] for row in rows)
        for row in rows:
            counts[window, row] = number + 1
        return number
