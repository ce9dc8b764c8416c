"""Loads the pack from its location as `liteattention`; finds a ComfyUI for the host tests."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import find_comfyui  # noqa: E402
from load_pack import load_pack  # noqa: E402

load_pack()


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """The ComfyUI checkout under test; skips with one line where there is none."""
    path = find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI found (COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI)")
    return path


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The folder of the tiny demo model."""
    return ROOT / "demo" / "model"


os.environ.pop("LITEATTENTION_BACKEND", None)
