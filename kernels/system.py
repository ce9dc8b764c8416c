"""The system around the pack: settings in the environment, the user's cache, a child process.

The only published file that reads the environment or starts a process: `docs/registry.md` says what for.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


def setting(name: str) -> str | None:
    """An environment variable, or None where it is not set or empty."""
    return os.environ.get(name) or None


def user_cache_dir() -> Path:
    """The folder for what is found out once per machine: LITEATTENTION_CACHE, else this pack's folder in the system's
    per-user cache."""
    chosen = setting("LITEATTENTION_CACHE")
    if chosen:
        return Path(chosen)
    if platform.system() == "Windows":
        base = setting("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = setting("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-liteattention"


@dataclass(frozen=True)
class Ended:
    """How a script has ended: `code` is negative for a signal; `said`: its last lines, on the error stream if any."""

    code: int
    said: list[str]


def run_script(script: Path, *arguments: str, timeout_s: float) -> Ended:
    """Run a Python file of the pack in a process of its own, with this interpreter and no shell.

    Raises:
        TimeoutError: it did not end in time. OSError: the system did not let it start.
    """
    # PYTHONPATH of the host could shadow what the script needs, which finds the pack by its own location.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        child = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True,
                               timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    said = (child.stderr or child.stdout or "").strip().splitlines()
    return Ended(child.returncode, [line for line in said if line.strip()])
