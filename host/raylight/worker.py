"""In a worker of Raylight: patch its model, and say what the last run did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from ...runtime import LiteAttentionConfig, Reason, RunHandle
from ...runtime.merged_summary import to_plain
from ...runtime.prepare import prepare
from ...runtime.reasons import CUT_APART, PIPEFUSION, RING
from ...runtime.rules import ErrorBudget, Threshold
from .. import compat, families, interop
from ..attach import attach, detach, run_handle
from ..compat import core
from ..share import Share
from . import doors

KEY = "lite_attention_raylight"
"""Key of the wrapper that opens the blocks."""
RULES = {rule.__name__: rule for rule in (ErrorBudget, Threshold)}
NOT_ATTACHED, NO_RUN, DONE = "not attached", "no run", "done"

NO_SELF_ATTENTION = "no self-attention reached LiteAttention in this Raylight worker: {}"
ANOTHER_WAY = "this Raylight computes it in another way. Update both packs, or report it with both versions"


class Parallel(NamedTuple):
    """How Raylight splits a model: processes that split the heads, the keys (ring), the rows (CFG)."""

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    pipefusion: bool = False

    @classmethod
    def of(cls, parallel: Mapping) -> Parallel:
        """From the dictionary that Raylight keeps in its workers."""
        pipefusion = bool(parallel.get("pipefusion_enabled"))
        if pipefusion or not parallel.get("is_xdit"):
            return cls(pipefusion=pipefusion)
        return cls(*(int(parallel.get(f"{name}_degree") or 1) for name in ("ulysses", "ring", "cfg")))


def apply(model: Any, settings: dict | None, parallel: Mapping) -> Any:
    """A clone of `model` (ModelPatcher) with LiteAttention; what an earlier call has put on it is replaced.

    Asks for the backend and compiles the kernels: in mid-run the other GPUs would wait for it.

    Args:
        settings: as `actors.settings` makes them; None takes LiteAttention off.
        parallel: Raylight's own dictionary.

    Raises:
        ValueError: no model is loaded, or another attention is in the place of Raylight's inner attention.
    """
    if model is None:
        raise ValueError("No model is loaded in Raylight's workers; connect the ray_actors output of a Raylight model "
                         "loader.")
    network, degrees = interop.network(model), Parallel.of(parallel)
    split = degrees.ulysses * degrees.ring > 1
    door = doors.choose(network) if split else doors.Door("")
    patched = _without(model, door)
    if settings is None:
        return patched
    _refuse_inner(patched, door)
    config = _config(settings)
    patched = attach(patched, config, handle=RunHandle(), share=_share(network, degrees, door))
    if door.kind == "inner":
        patched.model_options["transformer_options"][door.key] = doors.InnerAttention()
    elif door.kind == "ring":
        doors.open_ring()
        patched.add_wrapper_with_key(core(compat.APPLY_MODEL), KEY, _blocks_known)
    prepare(config, patched.load_device, _head_dim(network), _dtype(patched.model))
    return patched


def last_run(model: Any) -> tuple[str, dict | None]:
    """(what there is of a last run, its summary as plain values or None)."""
    handle = None if model is None else run_handle(model)
    if handle is None:
        return NOT_ATTACHED, None
    return (NO_RUN, None) if handle.summary is None else (DONE, to_plain(handle.summary))


def _config(settings: dict) -> LiteAttentionConfig:
    rule, value = settings["rule"]
    return LiteAttentionConfig(**{**settings, "rule": RULES[rule](value)})


def _share(network: torch.nn.Module, degrees: Parallel, door: doors.Door) -> Share:
    rank = 0
    if degrees.cfg > 1:
        rank = import_module("xfuser.core.distributed").get_classifier_free_guidance_rank()
    split = degrees.ulysses * degrees.ring > 1
    reason = _stays_dense(network, degrees) if split or degrees.pipefusion else None
    return Share(rank, degrees.cfg, degrees.ulysses, reason,
                 partial(_unreached, door, reason) if split or degrees.pipefusion else None)


def _stays_dense(network: torch.nn.Module, degrees: Parallel) -> Reason | None:
    """Why no call of a model that is split this way can be sparse, or None."""
    if degrees.pipefusion:
        return PIPEFUSION
    if degrees.ring > 1:
        return RING
    family = families.of(network)
    # Wan and MiniMax H3 are one sequence, cut into runs of neighbours. Others cut their text by itself.
    one_sequence = family is not None and (family.numbering is families.WAN
                                           or type(network).__name__ in doors.PASSES_OPTIONS)
    return None if one_sequence else CUT_APART


def _unreached(door: doors.Door, reason: Reason | None, options: Mapping) -> str:
    """For the run summary."""
    if reason is not None:
        return f"{reason.meaning} Try: {reason.hint}"
    if door.missing:
        return NO_SELF_ATTENTION.format(f"{door.missing}. Update LiteAttention")
    other = options.get(door.key)
    if other is not None and not isinstance(other, doors.InnerAttention):
        return NO_SELF_ATTENTION.format(
            f"{_display(other)}, set by a node after it, has the attention; remove one of the two")
    return NO_SELF_ATTENTION.format(ANOTHER_WAY)


def _refuse_inner(model: Any, door: doors.Door) -> None:
    other = model.model_options.get("transformer_options", {}).get(door.key)
    if other is not None and not isinstance(other, doors.InnerAttention):
        raise ValueError(f"Raylight's workers already have {_display(other)} as their inner attention, and "
                         "LiteAttention (Raylight) cannot be there as well. Remove one of the two nodes, and load the "
                         "model again.")


def _display(processor: object) -> str:
    """ "MiniMax H3 SLA" for MiniMaxH3SLA."""
    name = type(processor).__name__
    return {"MiniMaxH3SLA": "MiniMax H3 SLA"}.get(name, name)


def _without(model: Any, door: doors.Door) -> Any:
    patched = detach(model)
    if isinstance(patched.model_options["transformer_options"].get(door.key), doors.InnerAttention):
        del patched.model_options["transformer_options"][door.key]
    patched.remove_wrappers_with_key(core(compat.APPLY_MODEL), KEY)
    return patched


def _blocks_known(executor: Callable, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper."""
    with doors.blocks_known(executor.class_obj.diffusion_model):
        return executor(*args, **kwargs)


def _head_dim(network: torch.nn.Module) -> int:
    """Of the first attention that says so."""
    return next((m.head_dim for m in network.modules() if isinstance(getattr(m, "head_dim", None), int)), 128)


def _dtype(model: Any) -> torch.dtype:
    """In which ComfyUI computes a model."""
    return getattr(model, "get_dtype_inference", model.get_dtype)()
