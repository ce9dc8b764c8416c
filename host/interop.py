"""Other nodes on the same model: conflicts, replaced attention, repeated calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from ..runtime.reasons import CROSS_ATTENTION, SPARSE_ON_TOP, Reason
from .compat import core

OVERRIDE = "optimized_attention_override"
_PREPARE_STATE = "comfy.patcher_extension:CallbacksMP.ON_PREPARE_STATE"
_SPARSE_MODULE = "comfy_extras.nodes_sparse_attention"
_SPARSE_KEY = "block_sparse_attention"

SPARSE_NOTE = "Model Sparse Attention, applied after this node, has the attention. Remove one of the two nodes"
FULLGRAPH_NOTE = ("torch.compile is set to fullgraph, and attention that keeps masks cannot be part of a graph; "
                  "LiteAttention is off in this run. Turn fullgraph off")


def network(patcher: Any) -> torch.nn.Module | None:
    """The diffusion model of a ModelPatcher."""
    return getattr(getattr(patcher, "model", None), "diffusion_model", None)


def compiled_as_one_graph(model_options: Mapping) -> bool:
    """Whether a compile node forbids graph breaks: sparse attention is one, and the run would end with an error."""
    return bool((model_options.get("torch_compile_kwargs") or {}).get("fullgraph"))


def take_off(transformer_options: dict, fallback: str) -> None:
    """Put the fallback attention in the place of LiteAttention's override, where that override is called first.

    Args:
        fallback: the attribute of LiteAttention's override that holds the fallback attention.
    """
    current = transformer_options.get(OVERRIDE)
    if hasattr(current, fallback):
        transformer_options[OVERRIDE] = getattr(current, fallback)
        if transformer_options[OVERRIDE] is None:
            del transformer_options[OVERRIDE]


def refuse_sparse(model: Any, fallback: Callable | None) -> None:
    """Before LiteAttention is attached to `model` (ModelPatcher), whose attention override is `fallback`.

    Core's Model Sparse Attention puts its override on top again at every model call, also over later nodes. The
    override found on the model is therefore not enough to recognize it.

    Raises:
        ValueError: `model` has Model Sparse Attention.
    """
    if getattr(fallback, "__module__", "") == _SPARSE_MODULE or _has_sparse(model):
        raise ValueError("model already has Model Sparse Attention; two sparse attentions cannot share a model. "
                         "Remove one of the two nodes.")


def sparse_on_top(options: Mapping) -> Reason | None:
    """SPARSE_ON_TOP where Model Sparse Attention gets the attention calls of a model call with these
    transformer_options first, or None."""
    return SPARSE_ON_TOP if getattr(options.get(OVERRIDE), "__module__", "") == _SPARSE_MODULE else None


def replaced_attention(model: Any, sparse_calls: int, dense_calls: Mapping[Reason, int]) -> str | None:
    """The note on a run in which no self-attention reached LiteAttention, or None.

    Args:
        model: the ModelPatcher of the run.
        dense_calls: by reason.
    """
    if not sparse_calls and not dense_calls and _has_sparse(model):
        return SPARSE_NOTE
    if sparse_calls or set(dense_calls) != {CROSS_ATTENTION}:
        return None
    patched = [name for name in getattr(model, "object_patches", ()) if name.endswith("attn.forward")]
    by = (f"a node has replaced {patched[0]} and {len(patched) - 1} more; remove it, or this one" if patched
          else "the model, or a node, computes it in another way")
    return f"no self-attention reached LiteAttention: {by}"


def _has_sparse(model: Any) -> bool:
    return _SPARSE_KEY in (getattr(model, "callbacks", {}).get(core(_PREPARE_STATE)) or {})


class Repeats:
    """How often each row has been evaluated in the present call that the sampler made of the model.

    Nodes that cut a latent into tiles evaluate every tile with the same conditionings, and guiders may add passes of
    their own. Each of these passes is another image: it has masks of its own, found again by its place in the order.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[torch.Tensor, Counter]] = {}

    def number(self, model: Hashable, window: Hashable, rows: Sequence[Hashable] | None, options: Mapping) -> int:
        """How often one of `rows` came before, within this call of the sampler; counts them.

        Args:
            model: identity of the network; one thread evaluates it.
            window: identity of the context window, or None.
            rows: from `row_names`.
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
