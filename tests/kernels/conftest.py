"""Triton's interpreter where there is no GPU; has to be chosen before Triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device(interpreted):
    """Where the Triton backend runs in this process."""
    return torch.device("cpu" if interpreted else "cuda")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed on this system")
    return request.param
