"""Set up what a command needs and run it there: the interpreter at hand if it has everything, else a `.venv`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "tools" / "requirements.txt"
WITHOUT_DEPENDENCIES = ROOT / "tools" / "requirements.raylight.txt"
_INSIDE = "LITEATTENTION_ENVIRONMENT_READY"

PACK_MODULES = ("torch", "numpy", "safetensors", "PIL")
COMFY_MODULES = ("aiohttp", "yaml", "torchsde", "torchvision", "einops", "transformers", "av", "comfy_kitchen",
                 "comfyui_frontend_package", "sqlalchemy", "alembic", "tqdm", "scipy", "psutil")


def rerun_with_requirements(comfy_path: Path | None, always_venv: bool = False) -> None:
    """Return if this interpreter has what is needed; else make `.venv`, run this very command in it and exit.

    Args:
        comfy_path: also provide the requirements of this ComfyUI.
        always_venv: use `.venv` even if this interpreter has the modules (tests pin versions).
    """
    if os.environ.get(_INSIDE):
        return
    needed = PACK_MODULES + (COMFY_MODULES if comfy_path else ())
    if not always_venv and all(importlib.util.find_spec(name) for name in needed):
        return
    python = prepare(comfy_path)
    sys.exit(subprocess.call([str(python), *sys.argv], env={**os.environ, _INSIDE: "1"}))


def prepare(comfy_path: Path | None) -> Path:
    """Make `.venv` or bring it up to date; its interpreter. Does nothing when the requirements have not changed."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    files = [REQUIREMENTS] + ([comfy_path / "requirements.txt"] if comfy_path else [])
    wanted = hashlib.sha256(b"".join(f.read_bytes() for f in (*files, WITHOUT_DEPENDENCIES))).hexdigest()
    stamp = VENV / "liteattention-requirements"
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Setting up {VENV} (torch and friends: a few minutes the first time) …", flush=True)
    if not python.exists():
        venv.create(VENV, with_pip=True)
    arguments = [item for f in files for item in ("-r", str(f))]
    for given in (arguments, ["--no-deps", "-r", str(WITHOUT_DEPENDENCIES)]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *given],
                       check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python
