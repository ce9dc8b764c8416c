"""Other nodes on the same model: conflicts, replaced attention, passes of one evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.reasons import CROSS_ATTENTION, SPARSE_ON_TOP, Reason
from . import families, model_call
from .compat import attention_name, core

OVERRIDE = "optimized_attention_override"
SIGMAS = "lite_attention_sigmas"
_CALC_COND_BATCH = "comfy.patcher_extension:WrappersMP.CALC_COND_BATCH"
_PREPARE_STATE = "comfy.patcher_extension:CallbacksMP.ON_PREPARE_STATE"
_SPARSE_MODULE = "comfy_extras.nodes_sparse_attention"
_SPARSE_KEY = "block_sparse_attention"

NO_CALL = "no attention call reached LiteAttention: {}"
NO_SELF_ATTENTION = "no self-attention reached LiteAttention: {}"
SPARSE_NOTE = "Model Sparse Attention, applied after this node, has the attention. Remove one of the two nodes"
FULLGRAPH_NOTE = ("torch.compile is set to fullgraph, and attention that keeps masks cannot be part of a graph; "
                  "LiteAttention is off in this run. Turn fullgraph off")


def network(patcher: Any) -> torch.nn.Module | None:
    """The diffusion model of a ModelPatcher."""
    return getattr(getattr(patcher, "model", None), "diffusion_model", None)


def off(model_options: Mapping, network: torch.nn.Module | None) -> str:
    """Why the whole run is left to the attention that was there before, and what to do; "" where it is not."""
    return FULLGRAPH_NOTE if compiled_as_one_graph(model_options) else families.not_served(network)


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


def unreached(patcher: Any, options: Mapping, fallback: str, sparse_calls: int,
              dense_calls: Mapping[Reason, int]) -> str:
    """Why no self-attention reached LiteAttention in a run that has evaluated its model, and what to do; "" where one
    did.

    Args:
        patcher: the ModelPatcher of the run. options: its transformer_options.
        fallback: the attribute of LiteAttention's override that holds the fallback attention.
        dense_calls: by reason.
    """
    if sparse_calls or set(dense_calls) - {CROSS_ATTENTION}:
        return ""
    on_top = options.get(OVERRIDE)
    if not dense_calls and not hasattr(on_top, fallback):
        name = "another attention" if on_top is None else attention_name(on_top)
        return SPARSE_NOTE if _has_sparse(patcher) else NO_CALL.format(
            f"{name}, set by a node after it, has the attention; put LiteAttention last before the sampler")
    reached = NO_SELF_ATTENTION if dense_calls else NO_CALL
    replaced = _replaced_modules(patcher)
    if replaced:
        return reached.format(f"a node has replaced {replaced[0]} and {len(replaced) - 1} more; remove it, or this one")
    if (options.get("patches_replace") or {}).get("dit"):
        return reached.format("a node computes whole blocks of the model; remove it, or this one")
    return reached.format("the model, or a node, computes it in another way; LiteAttention cannot make this model "
                          "faster")


def _replaced_modules(patcher: Any) -> list[str]:
    """The forwards of attention modules that another node has replaced, by name."""
    patched = [name for name in getattr(patcher, "object_patches", ()) if name.endswith(".forward")]
    patched += [f"diffusion_model.{name}.forward" for name, module in getattr(network(patcher), "named_modules", list)()
                if _is_replaced(module)]
    return [name for name in dict.fromkeys(patched) if "attn" in name or "attention" in name]


def _is_replaced(module: torch.nn.Module) -> bool:
    """Whether a module computes by another forward than its class's. ComfyUI puts that one back as an attribute."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _has_sparse(model: Any) -> bool:
    return _SPARSE_KEY in (getattr(model, "callbacks", {}).get(core(_PREPARE_STATE)) or {})


def hand_on_sigmas(model_options: dict) -> None:
    """Into a guider's options, for a run on several devices. *MultiGPU CFG Split* gives the networks copies of the
    noise level, new ones at each call; which passes belong to one evaluation is told by the sampler's own tensor."""

    def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
        options = {**model_options.get("transformer_options", {}), SIGMAS: timestep}
        return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})

    kind = core(_CALC_COND_BATCH)
    if kind is not None:
        wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        wrappers.setdefault(kind, {})[SIGMAS] = [calc_cond_batch]


@dataclass
class Evaluation:
    """One call that a sampler makes of a model, which a guider may answer by several passes of the network.

    Attributes:
        sigmas: all its passes have this very tensor. A look at its value would wait for the device, and a sampler may
            come back to a noise level.
        first: fingerprint of the first pass of the network in the run. A guider's extra passes come later; patches that
            other nodes put on a running model are on the first pass, too.
    """

    sigmas: torch.Tensor | None
    first: Hashable
    counts: Counter = field(default_factory=Counter)

    def number(self, window: Hashable, rows: Sequence[Hashable] | None) -> int:
        """How often one of `rows` came before in this evaluation; counts them.

        Nodes that cut a latent into tiles evaluate every tile with the same conditionings, and guiders may add passes
        of their own. Each of these passes is another image: it has masks of its own, found again by this number.

        Args:
            window: identity of the context window, or None.
            rows: from `row_names`.
        """
        if self.sigmas is None or not rows:
            return 0
        number = max(self.counts[window, row] for row in rows)
        for row in rows:
            self.counts[window, row] = number + 1
        return number


class Evaluations:
    """The present evaluation of each network of a run, and on which device each row is evaluated. One thread evaluates
    a network.

    Args:
        begun: called at the start of each evaluation of the network, and the context window, that came first.
    """

    def __init__(self, begun: Callable[[], None]) -> None:
        self._present: dict[Hashable, Evaluation] = {}
        self._devices: dict[Hashable, torch.device] = {}
        self._begun = begun
        self._first: Hashable = None

    def of(self, model: Hashable, window: Hashable, options: Mapping) -> Evaluation:
        """The evaluation that a pass with these transformer_options belongs to."""
        sigmas, present = options.get(SIGMAS, options.get("sigmas")), self._present.get(model)
        if present is None or sigmas is None or present.sigmas is not sigmas:
            first = model_call.pass_fingerprint(options) if present is None else present.first
            self._present[model] = present = Evaluation(sigmas, first)
            self._first = self._first or (model, window)
            if sigmas is not None and self._first == (model, window):
                self._begun()
        return present

    def moved(self, window: Hashable, rows: Sequence[Hashable] | None, options: Mapping) -> bool:
        """Whether a pass with these transformer_options has a row that another device had before. *MultiGPU CFG Split*
        deals the rows out anew where a conditioning begins or ends in mid-run."""
        device = options.get("multigpu_thread_device")
        if device is None or rows is None:
            return False
        before = [self._devices.get((window, row), device) for row in rows]
        self._devices.update({(window, row): device for row in rows})
        return any(held != device for held in before)
