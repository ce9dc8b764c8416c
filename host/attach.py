"""Patch a ComfyUI model: override, run and model-call wrappers, step callback."""

from __future__ import annotations

import json
import logging
import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..runtime import (
    AttentionCall,
    BreakEvens,
    Evaluation,
    LayerId,
    LiteAttentionConfig,
    Receipt,
    RunHandle,
    Session,
    StepReport,
)
from . import companions, containers, families, frames, model_call, progress, prompt
from .compat import allocation_guard, attention_name, faster_dense, free_memory
from .environment import environment
from .profiles import ProfiledRuns

log = logging.getLogger("LiteAttention")

OVERRIDE = companions.OVERRIDE
KEY = "lite_attention"
"""Key of our wrappers and of the run in transformer_options."""
EVALUATION_KEY = "lite_attention_evaluation"
_PREVIOUS = "lite_attention_previous"
_HANDLE = "lite_attention_handle"


@dataclass(frozen=True)
class _Run:
    """What a sampling run hangs into transformer_options; an object, because dicts in there are copied."""

    session: Session
    owner: object
    ordinary: object
    moving_windows: bool
    repeats: companions.Repeats = field(default_factory=companions.Repeats)


def attach(model: Any, config: LiteAttentionConfig, *, node_id: str | None = None,
           handle: RunHandle | None = None, continue_from: RunHandle | None = None,
           profiled: ProfiledRuns | None = None) -> Any:
    """A clone of `model` (ModelPatcher) whose sampling runs use skip-mask attention; `model` is left as it is.

    Chains the attention override found on the model. A second application replaces the first.

    Args:
        node_id: node that shows progress text.
        handle: receives the receipt of each run.
        continue_from: handle of the runs whose masks these runs go on with; told here that they are wanted.
        profiled: where these runs take a profile from, or leave one.

    Raises:
        ValueError: the model already has ComfyUI's own sparse attention, or the profile is of another architecture.
    """
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    while hasattr(previous, _PREVIOUS):
        previous = getattr(previous, _PREVIOUS)
    companions.refuse_sparse(patched, previous)
    if previous is not None:
        log.info("LiteAttention: calls it leaves go on to the attention before it (%s)", attention_name(previous))
    if profiled is not None:
        profiled.check(model)
    if continue_from is not None:
        continue_from.wanted = True
    owner = object()
    options[OVERRIDE] = make_override(previous, owner)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY,
                                 make_run_wrapper(config, owner, node_id, handle or RunHandle(), break_evens(previous),
                                                  continue_from, profiled, previous))
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

        evaluation, layer = _caller(kwargs, owner)
        if evaluation is None:
            return run_previous()
        call = AttentionCall.from_hook(q, k, v, heads, mask, skip_reshape, skip_output_reshape, kwargs.get("scale"))
        return evaluation.attend(call, layer, run_previous)

    def container_function(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                           skip_output_reshape=False, **kwargs):
        arguments = dict(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                         skip_output_reshape=skip_output_reshape, **kwargs)

        def run_previous() -> torch.Tensor:
            if call is not None and type(evaluation).attend is Evaluation.attend:  # else it goes on with the call
                call.release()
            return containers.previous_with_containers(previous, q, k, v, heads, arguments)

        call = None
        evaluation, layer = _caller(kwargs, owner)
        if evaluation is None:
            return run_previous()
        call = AttentionCall.from_hook(q.peek(), k.peek(), v.peek(), heads, mask, skip_reshape, skip_output_reshape,
                                       kwargs.get("scale"))
        try:
            return evaluation.attend(call, layer, run_previous, repeatable=False)
        finally:
            containers.empty(q, k, v)

    # Traced, the block number freezes at its first value (ComfyUI drops the guards on transformer_options) and every
    # layer would share the first one's mask.
    override = torch.compiler.disable(lite_attention_override)
    setattr(override, _PREVIOUS, previous)
    setattr(override, containers.ENTRY, torch.compiler.disable(container_function))
    return override


def _caller(keywords: dict, owner: object) -> tuple[Evaluation | None, LayerId | None]:
    """The forward pass and the layer that an attention call comes from; (None, None) if it is none of ours."""
    options = keywords.get("transformer_options") or {}
    held = options.get(EVALUATION_KEY)
    if held is None or held[0] is not owner:
        return None, None
    try:
        return held[1], model_call.layer_id(options)
    except Exception as error:
        held[1].session.note(f"which layer calls cannot be told. {type(error).__name__}: {str(error)[:200]}")
        return held[1], None


def apply_model(executor: Callable, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None,
                control: Any = None, transformer_options: dict | None = None, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: gives the forward pass its context, in the per-call transformer_options."""
    run = (transformer_options or {}).get(KEY)
    if isinstance(run, _Run):
        module = getattr(executor.class_obj, "diffusion_model", None)
        evaluation = _evaluation(run, executor.class_obj, x, c_crossattn, transformer_options, kwargs)
        with ExitStack() as stack:
            numbered = {**transformer_options, EVALUATION_KEY: (run.owner, evaluation)}
            try:
                numbered = stack.enter_context(families.numbered(module, numbered))
            except Exception as error:
                run.session.note(f"the blocks of the model cannot be numbered. {type(error).__name__}: "
                                 f"{str(error)[:200]}")
            return executor(x, t, c_concat, c_crossattn, control, numbered, **kwargs)
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def _evaluation(run: _Run, model: Any, x: torch.Tensor, context: torch.Tensor | None, options: dict,
                keywords: dict) -> Evaluation:
    """The context of a model call. What a host tells in a way that is not understood leaves the call as it was."""
    module = getattr(model, "diffusion_model", None)
    try:
        rows, window = model_call.row_names(options, x.shape[0]), model_call.window_key(options)
        leave = model_call.leave_reason(options, run.ordinary, run.moving_windows)
        if companions.sparse_on_top(options):
            leave = companions.SPARSE_ON_TOP
            run.session.note(companions.SPARSE_NOTE)
        elif leave is None:
            repeat = run.repeats.number(id(model), window, rows, options)
            window = (window, repeat) if repeat else window
        return run.session.evaluation(
            model=id(model),
            rows=rows,
            latent_tokens=families.video_tokens(module, tuple(x.shape), context, keywords, options),
            window=window,
            leave=leave,
            frame_tokens=frames.frame_tokens(module, tuple(x.shape), keywords))
    except Exception as error:
        run.session.note(f"a call of the model is not understood and left as it was. {type(error).__name__}: "
                         f"{str(error)[:200]}")
        return run.session.evaluation(model=id(model), rows=None, latent_tokens=None)


def make_run_wrapper(config: LiteAttentionConfig, owner: object, node_id: str | None, handle: RunHandle,
                     timed: BreakEvens | None = None, continue_from: RunHandle | None = None,
                     profiled: ProfiledRuns | None = None, previous: Callable | None = None) -> Callable:
    """OUTER_SAMPLE wrapper: a session per sampling run, freed however the run ends."""

    def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
                     disable_pbar=False, seed=None, **kwargs):
        guider = executor.class_obj
        prompt_id, graph = prompt.running() or (None, None)
        handle.start(prompt_id)
        kept, why_none = continue_from.take(prompt_id) if continue_from is not None else (None, "")
        open_session = Session if profiled is None else partial(profiled.open, guider.model_patcher, Session)
        session = open_session(config, max(1, len(sigmas) - 1), allocating=allocation_guard, break_evens=timed,
                               kept=kept, free_memory=free_memory, on_step=_step_texts(node_id),
                               previous=attention_name(previous),
                               faster_dense=faster_dense(previous, guider.model_patcher.load_device))
        if why_none:
            session.note(f"starting fresh: {why_none}")
        original_options = guider.model_options
        try:
            guider.model_options = _with_run(original_options, session, owner)
            # Before the first step, not inside it: the first question on a machine takes a while.
            if guider.model_patcher.load_device.type != "cpu":
                progress.show("starting; the first run on a machine checks and compiles its kernels", node_id)
            session.backend(guider.model_patcher.load_device)
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, _step_callback(session, callback),
                              disable_pbar, seed, **kwargs)
            bypassed = companions.bypass_note(guider.model_patcher, session.statistics.taken, session.statistics.left)
            if bypassed:
                session.note(bypassed)
            if profiled is not None:
                profiled.finish(guider.model_patcher, session)
            _keep_masks(session, handle, graph, node_id)
            _keep_pictures(session, handle, graph, node_id)
            return result
        finally:
            guider.model_options = original_options
            _close(session, handle, node_id, guider.model_patcher)

    setattr(outer_sample, _HANDLE, handle)
    return outer_sample


def run_handle(model: Any) -> RunHandle | None:
    """The handle that receives the accounts of a patched model's runs, or None for a model that `attach` has not
    patched. Nodes after it may have cloned the model."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return getattr(wrappers[-1], _HANDLE, None) if wrappers else None


def _with_run(model_options: dict, session: Session, owner: object) -> dict:
    """A clone of a guider's options with the run in it, or without where they are not understood."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer_options = options.setdefault("transformer_options", {})
    try:
        if companions.compiled_as_one_graph(options):
            session.note(companions.FULLGRAPH_NOTE)
            companions.take_off(transformer_options, _PREVIOUS)
            return options
        transformer_options[KEY] = _Run(session, owner, model_call.pass_fingerprint(transformer_options),
                                        model_call.windows_move(options))
    except Exception as error:
        session.note(f"the model's options are not understood; attention stays as it was. {type(error).__name__}: "
                     f"{str(error)[:200]}")
    return options


def _step_callback(session: Session, callback: Callable | None) -> Callable:
    """The sampler's step callback with the session's step in front; previews and progress bars see no difference."""

    def lite_attention_step(step, x0, x, total_steps):
        try:
            session.end_step(step)
        except Exception as error:
            session.note(f"what some steps did is not known. {type(error).__name__}: {str(error)[:200]}")
        return callback(step, x0, x, total_steps) if callback is not None else None

    return lite_attention_step


def _keep_masks(session: Session, handle: RunHandle, graph: Any, node_id: str | None) -> None:
    """After the last step. Never raises: the latent is there."""
    try:
        # A node that ComfyUI has cached has not seen this graph; outside a server there is none to see.
        linked = prompt.continues(graph, node_id)
        handle.keep(session, handle.wanted if linked is None else linked)
    except Exception as error:
        session.note(f"masks are not kept for continue_from. {type(error).__name__}: {str(error)[:200]}")


def _keep_pictures(session: Session, handle: RunHandle, graph: Any, node_id: str | None) -> None:
    """After the last step. Never raises: the latent is there."""
    try:
        known = graph is not None and node_id in graph
        handle.picture(session, prompt.wanted_masks(graph, node_id) if known else handle.wanted_pictures)
    except Exception as error:
        session.note(f"masks cannot be drawn. {type(error).__name__}: {str(error)[:200]}")


def _close(session: Session, handle: RunHandle, node_id: str | None, patcher: Any) -> None:
    """However the run has ended. Never raises: the latent, or the error of the run, is what its caller has to see."""
    handle.receipt = None
    try:
        handle.receipt = replace(session.close(), environment=environment(patcher))
        _show_receipt(handle.receipt, node_id, session.config.log_details)
    except Exception:
        # As text: a log that keeps its records would keep the run.
        log.error("LiteAttention: the account of the run is lost. %s", traceback.format_exc())


def _step_texts(node_id: str | None) -> Callable[[StepReport], None]:
    ticker = progress.Ticker(node_id)
    return lambda report: ticker.show(report.text)


def _show_receipt(receipt: Receipt, node_id: str | None, details: bool) -> None:
    log.info("LiteAttention: %s", receipt.text())
    if details:
        log.info("LiteAttention receipt %s", json.dumps(receipt.to_dict()))
    progress.show(receipt.node_text(), node_id)
