"""Find a ComfyUI checkout."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else the ComfyUI whose custom_nodes holds this pack, else ~/ComfyUI; None if there is none.

    Raises:
        FileNotFoundError: COMFYUI_PATH is set and holds no ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not is_comfyui(path):
            raise FileNotFoundError(f"COMFYUI_PATH is {named}; no ComfyUI (comfyui_version.py, main.py) is there")
        return path
    for path in (ROOT.parent.parent, Path.home() / "ComfyUI"):
        if is_comfyui(path):
            return path
    return None


def is_comfyui(path: Path) -> bool:
    """Whether `path` is the root of a ComfyUI checkout."""
    return (path / "comfyui_version.py").is_file() and (path / "main.py").is_file()


def comfyui_version(path: Path) -> str:
    """The version a checkout names, e.g. "0.33.0"."""
    text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__\s*=\s*"([^"]+)"', text).group(1)
