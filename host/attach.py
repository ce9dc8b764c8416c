"""Patch a ComfyUI model: override, run and model-call wrappers, step callback."""

from __future__ import annotations

import json
import logging
import traceback
import weakref
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..runtime import (
    AttentionCall,
    BreakEvens,
    ForwardPass,
    LayerId,
    LiteAttentionConfig,
    RunHandle,
    RunSummary,
    SamplingRun,
    words,
)
from . import chosen_attention, compat, containers, families, interop, model_call, progress
from .compat import allocation_guard, attention_name, core, faster_dense
from .environment import environment
from .language import language
from .share import WHOLE, Share

log = logging.getLogger("LiteAttention")

OVERRIDE = interop.OVERRIDE
KEY = "lite_attention"
"""Key of the pack's wrappers and of the run in transformer_options."""
FORWARD_KEY = "lite_attention_forward_pass"
_FALLBACK = "lite_attention_fallback"
_HANDLE = "lite_attention_handle"
STARTING = "starting; the first run on a machine checks and compiles its kernels"
OFF_HERE = "LiteAttention is off: this ComfyUI has no {names}. Update LiteAttention"


@dataclass(frozen=True)
class _HungRun:
    """What a sampling run hangs into transformer_options; an object, because dicts in there are copied."""

    run: SamplingRun
    owner: object
    ordinary: Hashable
    moving_windows: bool
    evaluations: interop.Evaluations
    share: Share


def attach(model: Any, config: LiteAttentionConfig, *, node_id: str | None = None,
           handle: RunHandle | None = None, continue_from: RunHandle | None = None, share: Share = WHOLE) -> Any:
    """A clone of `model` (ModelPatcher) whose sampling runs use skip-mask attention; `model` is left as it is.

    The attention override found on the model becomes the fallback attention. A second application replaces the first.

    Args:
        node_id: node that shows progress text.
        handle: receives the summary and the masks of each run.
        continue_from: handle of the runs whose masks these runs go on with.
        share: what this process computes of the model's calls.

    Where this ComfyUI lacks what the pack needs of it, the model is given back as it is, and the log says so.

    Raises:
        ValueError: the model already has ComfyUI's own sparse attention.
    """
    if missing := compat.missing():
        names = ", ".join(missing)
        log.warning(OFF_HERE.format(names=names))
        progress.show(node_id, [words(language())(OFF_HERE, names=names)], progress.running_workflow())
        return model
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    fallback = options.get(OVERRIDE)
    while hasattr(fallback, _FALLBACK):
        fallback = getattr(fallback, _FALLBACK)
    interop.refuse_sparse(patched, fallback)
    if fallback is not None:
        log.info("LiteAttention: dense calls are computed by the attention found on the model (%s)",
                 attention_name(fallback))
    if continue_from is not None:
        continue_from.continued = True
    owner = object()
    chosen = chosen_attention.chosen(interop.network(patched))
    options[OVERRIDE] = make_override(fallback, owner, containers.useful(fallback, chosen))
    run_wrapper = make_run_wrapper(config, owner, node_id, handle or RunHandle(), fallback, continue_from, share)
    for kind, wrapper in ((core(compat.OUTER_SAMPLE), run_wrapper), (core(compat.APPLY_MODEL), apply_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def detach(model: Any) -> Any:
    """A clone of `model` without LiteAttention, with the attention override that `attach` has found on it."""
    patched = model.clone()
    interop.take_off(patched.model_options.setdefault("transformer_options", {}), _FALLBACK)
    for kind in (compat.OUTER_SAMPLE, compat.APPLY_MODEL):
        patched.remove_wrappers_with_key(core(kind), KEY)
    return patched


@cache
def _timed() -> tuple[BreakEvens, weakref.WeakKeyDictionary[Callable, BreakEvens]]:
    """Timings of the runs of this process: with ComfyUI's own attention, and with each override that was found."""
    return BreakEvens(), weakref.WeakKeyDictionary()


def break_evens(fallback: Callable | None) -> BreakEvens:
    """Where runs with this fallback attention share their timings, which depend on nothing that a prompt changes."""
    own, overrides = _timed()
    if fallback is None:
        return own
    try:
        return overrides.setdefault(fallback, BreakEvens())
    except TypeError:  # neither hashable nor weakly referable: for this application of the node only
        return BreakEvens()


def make_override(fallback: Callable | None, owner: object, takes_containers: bool = False) -> Callable:
    """The attention override. A plain function: ComfyUI up to 0.18 deep-copies callable objects with every clone.

    Args:
        fallback: computes the dense calls; None: the attention that the layer has chosen, or the called function.
        takes_containers: whether the override has an entry for containers.
    """

    def chosen(keywords: dict) -> Callable | None:
        """The layer's own attention, unless an override would have stood in its place without this one, too."""
        options = keywords.get("transformer_options") or {}
        return chosen_attention.current(options) if fallback is None and options.get(OVERRIDE) is override else None

    def lite_attention_override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                                skip_output_reshape=False, **kwargs):
        def run_fallback() -> torch.Tensor:
            # Everything is passed on, `_inside_attn_wrapper` included: without it a wrapped function comes back here.
            arguments = dict(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                             skip_output_reshape=skip_output_reshape, **kwargs)
            if fallback is None:
                return (own or func)(q, k, v, heads, **arguments)
            return fallback(func, q, k, v, heads, **arguments)

        own = chosen(kwargs)
        _, forward_pass, layer = caller(kwargs.get("transformer_options"), owner)
        if forward_pass is None:
            return run_fallback()
        call = AttentionCall.from_hook(q, k, v, heads, mask, skip_reshape, skip_output_reshape, kwargs.get("scale"))
        return forward_pass.attend(call, layer, run_fallback, _dense_by(fallback, own, func))

    def container_function(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                           skip_output_reshape=False, **kwargs):
        arguments = dict(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                         skip_output_reshape=skip_output_reshape, **kwargs)

        def run_fallback() -> torch.Tensor:
            if call is not None:
                call.release()
            return containers.fallback_with_containers(fallback, own, q, k, v, heads, arguments)

        call, own = None, chosen(kwargs)
        _, forward_pass, layer = caller(kwargs.get("transformer_options"), owner)
        if forward_pass is None:
            return run_fallback()
        call = AttentionCall.from_hook(q.peek(), k.peek(), v.peek(), heads, mask, skip_reshape, skip_output_reshape,
                                       kwargs.get("scale"))
        try:
            return forward_pass.attend(call, layer, run_fallback,
                                       _dense_by(fallback, own, containers.core_attention()))
        finally:
            containers.empty(q, k, v)

    # Traced, the block number freezes at its first value (ComfyUI drops the guards on transformer_options) and every
    # layer would share the first one's mask.
    override = torch.compiler.disable(lite_attention_override)
    setattr(override, _FALLBACK, fallback)
    if takes_containers:
        setattr(override, containers.ENTRY, torch.compiler.disable(container_function))
    return override


def _dense_by(fallback: Callable | None, own: Callable | None, func: Callable) -> str:
    """Display name of the attention that computes a dense call."""
    if fallback is None and own is not None:
        return f"{attention_name(own)}, which the checkpoint has chosen"
    return attention_name(fallback or func)


def caller(options: dict | None, owner: object = None) -> tuple[SamplingRun | None, ForwardPass | None, LayerId | None]:
    """The run, the forward pass and the layer that an attention call with these transformer_options comes from; three
    times None for a call of another model.

    Args:
        owner: of the model; None: of any that `attach` has patched.
    """
    held = (options or {}).get(FORWARD_KEY)
    if held is None or owner not in (None, held[0]):
        return None, None, None
    _, run, forward_pass = held
    try:
        return run, forward_pass, model_call.layer_id(options)
    except Exception as error:
        run.notes.add(f"which layer calls cannot be told. {_text(error)}")
        return run, forward_pass, None


def apply_model(executor: Callable, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None,
                control: Any = None, transformer_options: dict | None = None, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: gives the forward pass its context, in the per-call transformer_options."""
    module = getattr(executor.class_obj, "diffusion_model", None)
    options = transformer_options or {}
    hung = options.get(KEY)
    with ExitStack() as stack:
        options = stack.enter_context(chosen_attention.followed(module, options))
        if isinstance(hung, _HungRun):
            forward_pass = _forward_pass(hung, executor.class_obj, x, c_crossattn, options, kwargs)
            options = {**options, FORWARD_KEY: (hung.owner, hung.run, forward_pass)}
            try:
                options = stack.enter_context(families.numbered(module, options))
            except Exception as error:
                hung.run.notes.add(f"the blocks of the model cannot be numbered. {_text(error)}")
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _forward_pass(hung: _HungRun, model: Any, x: torch.Tensor, context: torch.Tensor | None, options: dict,
                  keywords: dict) -> ForwardPass:
    """The context of a model call. A call whose arguments are not understood stays dense."""
    module = getattr(model, "diffusion_model", None)
    run = hung.run
    try:
        rows = hung.share.rows(model_call.row_names(options, x.shape[0]))
        window = model_call.window_key(options)
        unsupported = hung.share.stays_dense or families.stays_dense(module, keywords, options)
        if unsupported is not None:  # said also where no call reaches the override
            run.notes.add(f"attention stays dense. {unsupported.meaning}")
        evaluation = hung.evaluations.of(id(model), window, options)
        if hung.evaluations.moved(window, rows, options):
            run.notes.add("a prompt has moved to another GPU in mid-run; its masks start anew there")
        stays_dense = interop.sparse_on_top(options) or unsupported or model_call.dense_reason(
            options, (hung.ordinary, evaluation.first), hung.moving_windows)
        if stays_dense is None:
            repeat = evaluation.number(window, rows)
            window = (window, repeat) if repeat else window
        return run.forward_pass(
            model=id(model), rows=rows, window=window, stays_dense=stays_dense,
            video_tokens=hung.share.tokens(
                families.video_tokens(module, tuple(x.shape), context, keywords, options)))
    except Exception as error:
        run.notes.add(f"a call of the model is not understood and stays dense. {_text(error)}")
        return run.forward_pass(model=id(model), rows=None, video_tokens=None)


def make_run_wrapper(config: LiteAttentionConfig, owner: object, node_id: str | None, handle: RunHandle,
                     fallback: Callable | None = None, continue_from: RunHandle | None = None,
                     share: Share = WHOLE) -> Callable:
    """OUTER_SAMPLE wrapper: a `SamplingRun` per sampling run, closed however the run ends."""
    timed = break_evens(fallback)

    def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
                     disable_pbar=False, seed=None, **kwargs):
        guider = executor.class_obj
        device = guider.model_patcher.load_device
        network = interop.network(guider.model_patcher)
        chosen = next(iter(chosen_attention.chosen(network)), None)
        carried, why_none = continue_from.carried() if continue_from is not None else (None, "")
        handle.start(progress.prompt_id())
        display = progress.NodeDisplay(node_id)
        run = SamplingRun(config, max(1, len(sigmas) - 1), allocating=allocation_guard, break_evens=timed,
                          carried=carried, continued=handle.continued,
                          on_step=display.step,
                          faster_dense=faster_dense(fallback or chosen, device) if share is WHOLE else "")
        if why_none:
            run.notes.add(f"continue_from: {why_none}; the masks start anew")
        original_options = guider.model_options
        try:
            guider.model_options = _with_run(original_options, run, owner, share, network)
            devices = compat.devices(guider.model_patcher)
            if len(devices) > 1:
                interop.hand_on_sigmas(guider.model_options)
            if not run.unreached:
                _ask_backends(run, devices, display)
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, _step_callback(run, callback),
                              disable_pbar, seed, **kwargs)
            _finish(run, handle, guider)
            return result
        finally:
            guider.model_options = original_options
            _close(run, handle, display, guider.model_patcher)

    setattr(outer_sample, _HANDLE, handle)
    return outer_sample


def _ask_backends(run: SamplingRun, devices: list[torch.device],
                  display: progress.NodeDisplay) -> None:
    """Before the first step, not inside it: the first question on a machine takes a while, and with several GPUs each
    would be asked in a thread of its own."""
    if any(device.type != "cpu" for device in devices):
        display.say(STARTING)
    for device in devices:
        run.sparse.backend(device)


def run_handle(model: Any) -> RunHandle | None:
    """The handle that receives the summaries of a patched model's runs, or None for a model that `attach` has not
    patched. Nodes after it may have cloned the model."""
    wrappers = [] if compat.missing() else model.get_wrappers(core(compat.OUTER_SAMPLE), KEY)
    return getattr(wrappers[-1], _HANDLE, None) if wrappers else None


def _with_run(model_options: dict, run: SamplingRun, owner: object, share: Share,
              network: torch.nn.Module | None) -> dict:
    """A clone of a guider's options with the run in it, or without where the model is not served or they are not
    understood."""
    options = core(compat.CLONE_OPTIONS)(model_options)
    transformer_options = options.setdefault("transformer_options", {})
    try:
        run.unreached = interop.off(options, network)
        if run.unreached:
            interop.take_off(transformer_options, _FALLBACK)
            return options
        transformer_options[KEY] = _HungRun(run, owner, model_call.pass_fingerprint(transformer_options),
                                            model_call.windows_move(options),
                                            interop.Evaluations(run.begin_evaluation), share)
    except Exception as error:
        run.notes.add(f"the model's options are not understood; attention stays dense. {_text(error)}")
    return options


def _step_callback(run: SamplingRun, callback: Callable | None) -> Callable:
    """The sampler's step callback with the run's step in front; previews and progress bars see no difference."""

    def lite_attention_step(step, x0, x, total_steps):
        try:
            run.end_step(step)
        except Exception as error:
            run.notes.add(f"the counters of some steps are not known. {_text(error)}")
        return callback(step, x0, x, total_steps) if callback is not None else None

    return lite_attention_step


def _finish(run: SamplingRun, handle: RunHandle, guider: Any) -> None:
    """After the last step. Never raises: the latent is there."""
    try:
        options = guider.model_options.get("transformer_options") or {}
        run.finish()
        if run.evaluated and KEY in options:
            run.unreached = interop.unreached(guider.model_patcher, options, _FALLBACK, run.counters.sparse,
                                              run.counters.dense)
            if run.unreached and options[KEY].share.unreached is not None:
                run.unreached = options[KEY].share.unreached(options)
        handle.finish(run)
    except Exception as error:
        run.notes.add(f"the masks of this run are lost to later nodes. {_text(error)}")


def _close(run: SamplingRun, handle: RunHandle, display: progress.NodeDisplay, patcher: Any) -> None:
    """However the run has ended. Never raises: its caller has to see the latent, or the error of the run."""
    handle.summary = None
    try:
        handle.summary = replace(run.close(), environment=environment(patcher))
        _show(handle.summary, display)
    except Exception:
        # As text: a log that keeps its records would keep the run.
        log.error("LiteAttention: the run summary is lost. %s", traceback.format_exc())


def _show(summary: RunSummary, display: progress.NodeDisplay) -> None:
    log.info("LiteAttention: %s", summary.text())
    log.debug("LiteAttention run summary %s", json.dumps(summary.to_dict()))
    display.finish(summary)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
