"""Facts for bug reports: versions, device, model. No path, no prompt, no file name."""

from __future__ import annotations

import importlib
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..runtime import triton_package
from . import interop

UNKNOWN = "unknown"


@cache
def _versions() -> dict[str, str]:
    found = {"liteattention": UNKNOWN, "comfyui": UNKNOWN, "python": platform.python_version(),
             "system": platform.system(), "torch": torch.__version__, "triton": (triton_package() or ("", "none"))[1]}
    try:
        project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        found["liteattention"] = re.search(r'^version = "(.+)"', project, re.MULTILINE).group(1)
    except (OSError, AttributeError):
        pass
    try:
        found["comfyui"] = str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        pass
    return found


def environment(patcher: Any) -> dict[str, str]:
    """Of a run with this ModelPatcher. Never raises."""
    device = getattr(patcher, "load_device", None)
    try:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    except Exception:  # a broken driver: the run has a note on it
        name = UNKNOWN
    network = interop.network(patcher)
    return {**_versions(), "device": name, "model": type(getattr(network, "_orig_mod", network)).__name__}
