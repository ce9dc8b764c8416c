"""Loads the pack from its location as `liteattention`."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from load_pack import load_pack  # noqa: E402

load_pack()


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The folder of the tiny demo model."""
    return ROOT / "demo" / "model"


os.environ.pop("LITEATTENTION_BACKEND", None)
# The tensors are small: on a busy machine torch's threads wait for each other, up to a hundred times as long.
torch.set_num_threads(1)
