"""Triton's interpreter where there is no GPU; has to be chosen before Triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

# A busy machine is no failure: no example has to be done within a time.
settings.register_profile("kernels", deadline=None)
settings.load_profile("kernels")


def pytest_configure(config):
    # The interpreter is numpy underneath; NaN and Inf planted by tests make it warn.
    for category in ("RuntimeWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}:triton.runtime.interpreter")


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


@pytest.fixture
def place(backend, device):
    """Where the inputs of this backend lie."""
    return device if backend == "triton" else torch.device("cpu")

