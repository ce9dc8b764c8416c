"""What this folder uses of ComfyUI, and differences between its versions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch

CLONE_OPTIONS = "comfy.model_patcher:create_model_options_clone"
OUTER_SAMPLE = "comfy.patcher_extension:WrappersMP.OUTER_SAMPLE"
APPLY_MODEL = "comfy.patcher_extension:WrappersMP.APPLY_MODEL"
REQUIRED = (CLONE_OPTIONS, OUTER_SAMPLE, APPLY_MODEL, "comfy.model_patcher:ModelPatcher.clone",
            "comfy.model_patcher:ModelPatcher.add_wrapper_with_key", "comfy.model_patcher:ModelPatcher.get_wrappers",
            "comfy.model_patcher:ModelPatcher.remove_wrappers_with_key")
"""Without one of these the attention of a model is left as it was."""

_NAMES = {
    "attention_pytorch": "PyTorch's attention", "attention_sub_quad": "ComfyUI's sub-quadratic attention",
    "attention_split": "ComfyUI's split attention", "attention_xformers": "xFormers", "attention_sage": "SageAttention",
    "attention3_sage": "SageAttention 3", "attention_flash": "FlashAttention",
    "attention_comfy_kitchen_int8": "ComfyUI's INT8 attention",
}
"""Display names of ComfyUI's own attentions."""


def core(path: str) -> Any:
    """What ComfyUI has at "module:attribute.attribute", or None."""
    module, _, names = path.partition(":")
    try:
        return attrgetter(names)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


def missing() -> list[str]:
    """What is required and not in this ComfyUI."""
    return [path for path in REQUIRED if core(path) is None]


def server() -> Any:
    """ComfyUI's server, or None where none runs in this process."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def allocation_guard() -> AbstractContextManager:
    """To hold around allocations that outlive a transformer block.

    From 0.34 on ComfyUI may record a block's allocations and replay them; memory that stays has to be kept out
    of the recording. Older versions have no recorder.
    """
    pause = core("comfy.model_prefetch:pause_malloc_graph")
    return pause() if pause is not None else nullcontext()


def devices(patcher: Any) -> list[torch.device]:
    """Where runs with this ModelPatcher evaluate networks: on its device, and on those of *MultiGPU CFG Split*."""
    clones = getattr(patcher, "get_additional_models_with_key", lambda key: [])("multigpu")
    return list(dict.fromkeys(model.load_device for model in (patcher, *clones)))


def attention_name(function: Callable) -> str:
    """Display name, without a path, of an attention: one of ComfyUI's own, or an override and the pack that it comes
    from."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in _NAMES:
        return _NAMES[name]
    # The override of *Model Attention Backend* has the same name for every backend.
    captured = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "optimized_attention" in captured:
        return attention_name(function.__closure__[captured.index("optimized_attention")].cell_contents)
    module = str(getattr(function, "__module__", None) or "")
    folder, _, file = module.replace("\\", "/").rpartition("/")  # modules of custom nodes are named by their path
    return f"{name} of {file.split('.')[0] if folder else module}" if module else name


def faster_dense(override: Callable | None, device: torch.device) -> str:
    """Advice where PyTorch's attention computes dense calls and ComfyUI has a faster one (INT8, from 0.33 on), else "".
    The pack does not switch it on, because it changes the video."""
    own, pytorch = (core(f"comfy.ldm.modules.attention:{name}") for name in ("optimized_attention",
                                                                             "attention_pytorch"))
    if (override is None and device.type == "cuda" and own is not None and own is pytorch
            and core("comfy.ldm.modules.attention:COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE")):
        return ("for dense calls, Model Attention Backend with comfy kitchen attention before LiteAttention "
                "(INT8, changes the video a little)")
    return ""
