"""The folder for what is found out once per machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def user_cache_dir() -> Path:
    """LITEATTENTION_CACHE, else this pack's folder in the system's per-user cache."""
    if os.environ.get("LITEATTENTION_CACHE"):
        return Path(os.environ["LITEATTENTION_CACHE"])
    if platform.system() == "Windows":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-liteattention"
