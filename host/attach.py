"""Patch a ComfyUI model: override, run and model-call wrappers, step callback."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..runtime import AttentionCall, BreakEvens, LiteAttentionConfig, Receipt, RunHandle, Session, StepReport
from . import model_call, progress, prompt
from .compat import allocation_guard

log = logging.getLogger("LiteAttention")

OVERRIDE = "optimized_attention_override"
KEY = "lite_attention"
"""Key of our wrappers and of the run in transformer_options."""
EVALUATION_KEY = "lite_attention_evaluation"
_PREVIOUS = "lite_attention_previous"


@dataclass(frozen=True)
class _Run:
    """What a sampling run hangs into transformer_options; an object, because dicts in there are copied."""

    session: Session
    owner: object
    ordinary: object
    moving_windows: bool


def attach(model: Any, config: LiteAttentionConfig, *, node_id: str | None = None,
           handle: RunHandle | None = None, continue_from: RunHandle | None = None) -> Any:
    """A clone of `model` (ModelPatcher) whose sampling runs use skip-mask attention; `model` is left as it is.

    Chains the attention override found on the model. A second application replaces the first.

    Args:
        node_id: node that shows progress text.
        handle: receives the receipt of each run.
        continue_from: handle of the runs whose masks these runs go on with; told here that they are wanted.

    Raises:
        ValueError: the model already has ComfyUI's own sparse attention.
    """
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    while hasattr(previous, _PREVIOUS):
        previous = getattr(previous, _PREVIOUS)
    if getattr(previous, "__module__", "") == "comfy_extras.nodes_sparse_attention":
        raise ValueError("model already has Model Sparse Attention; two sparse attentions cannot share a model. "
                         "Remove one of the two nodes.")
    if previous is not None:
        log.info("LiteAttention: calls it leaves go on to the attention patched before it (%s)",
                 getattr(previous, "__qualname__", type(previous).__name__))
    if continue_from is not None:
        continue_from.wanted = True
    owner = object()
    options[OVERRIDE] = make_override(previous, owner)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY,
                                 make_run_wrapper(config, owner, node_id, handle or RunHandle(), break_evens(previous),
                                                  continue_from))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
    return patched


@cache
def _timed() -> tuple[BreakEvens, weakref.WeakKeyDictionary[Callable, BreakEvens]]:
    """What the runs of this process have timed: ComfyUI's own attention, and each override that was found."""
    return BreakEvens(), weakref.WeakKeyDictionary()


def break_evens(previous: Callable | None) -> BreakEvens:
    """Where runs with this previous attention share what they time: it depends on nothing that a prompt changes."""
    own, overrides = _timed()
    if previous is None:
        return own
    try:
        return overrides.setdefault(previous, BreakEvens())
    except TypeError:  # neither hashable nor weakly referable: for this application of the node only
        return BreakEvens()


def make_override(previous: Callable | None, owner: object) -> Callable:
    """The attention override. A plain function: ComfyUI up to 0.18 deep-copies callable objects with every clone."""

    def lite_attention_override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                                skip_output_reshape=False, **kwargs):
        def run_previous() -> torch.Tensor:
            # Everything is passed on, `_inside_attn_wrapper` included: without it a wrapped function comes back here.
            arguments = dict(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                             skip_output_reshape=skip_output_reshape, **kwargs)
            if previous is None:
                return func(q, k, v, heads, **arguments)
            return previous(func, q, k, v, heads, **arguments)

        options = kwargs.get("transformer_options") or {}
        held = options.get(EVALUATION_KEY)
        if held is None or held[0] is not owner:
            return run_previous()
        call = AttentionCall.from_hook(q, k, v, heads, mask, skip_reshape, skip_output_reshape, kwargs.get("scale"))
        return held[1].attend(call, model_call.layer_id(options), run_previous)

    # Traced, the block number freezes at its first value (ComfyUI drops the guards on transformer_options) and every
    # layer would share the first one's mask.
    override = torch.compiler.disable(lite_attention_override)
    setattr(override, _PREVIOUS, previous)
    return override


def apply_model(executor: Callable, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None,
                control: Any = None, transformer_options: dict | None = None, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: gives the forward pass its context, in the per-call transformer_options."""
    run = (transformer_options or {}).get(KEY)
    if isinstance(run, _Run):
        model = executor.class_obj
        patch_size = getattr(getattr(model, "diffusion_model", None), "patch_size", None)
        modalities = len(kwargs.get("latent_shapes") or [None])
        evaluation = run.session.evaluation(
            model=id(model),
            rows=model_call.row_names(transformer_options, x.shape[0]),
            latent_tokens=model_call.latent_tokens(tuple(x.shape), patch_size, modalities),
            window=model_call.window_key(transformer_options),
            leave=model_call.leave_reason(transformer_options, run.ordinary, run.moving_windows))
        transformer_options = {**transformer_options, EVALUATION_KEY: (run.owner, evaluation)}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def make_run_wrapper(config: LiteAttentionConfig, owner: object, node_id: str | None, handle: RunHandle,
                     timed: BreakEvens | None = None, continue_from: RunHandle | None = None) -> Callable:
    """OUTER_SAMPLE wrapper: a session per sampling run, freed however the run ends."""

    def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
                     disable_pbar=False, seed=None, **kwargs):
        guider = executor.class_obj
        prompt_id, graph = prompt.running() or (None, None)
        handle.start(prompt_id)
        kept, why_none = continue_from.take(prompt_id) if continue_from is not None else (None, "")
        session = Session(config, max(1, len(sigmas) - 1), allocating=allocation_guard, break_evens=timed, kept=kept,
                          on_step=lambda report: _show_step(report, node_id))
        if why_none:
            session.note(f"starting fresh: {why_none}")
        original_options = guider.model_options
        try:
            options = comfy.model_patcher.create_model_options_clone(original_options)
            transformer_options = options.setdefault("transformer_options", {})
            transformer_options[KEY] = _Run(session, owner, model_call.pass_fingerprint(transformer_options),
                                            model_call.windows_move(options))
            guider.model_options = options
            # Before the first step, not inside it: the first question on a machine takes a while.
            session.backend(guider.model_patcher.load_device)
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, _step_callback(session, callback),
                              disable_pbar, seed, **kwargs)
            # A node that ComfyUI has cached has not seen this graph; outside a server there is none to see.
            linked = prompt.continues(graph, node_id)
            handle.keep(session, handle.wanted if linked is None else linked)
            return result
        finally:
            guider.model_options = original_options
            receipt = session.close()
            handle.receipt = receipt
            _show_receipt(receipt, node_id, config.log_details)

    return outer_sample


def _step_callback(session: Session, callback: Callable | None) -> Callable:
    """The sampler's step callback with the session's step in front; previews and progress bars see no difference."""

    def lite_attention_step(step, x0, x, total_steps):
        try:
            session.end_step(step)
        except Exception:
            log.exception("LiteAttention: the books of step %s are lost; the render goes on", step)
        return callback(step, x0, x, total_steps) if callback is not None else None

    return lite_attention_step


def _show_step(report: StepReport, node_id: str | None) -> None:
    progress.show(report.text(), node_id)


def _show_receipt(receipt: Receipt, node_id: str | None, details: bool) -> None:
    text = receipt.text()
    log.info("LiteAttention: %s", text)
    if details:
        log.info("LiteAttention receipt %s", json.dumps(receipt.to_dict()))
    progress.show(text, node_id)
