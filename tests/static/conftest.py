"""The benchmarks' folder on the path: the gate is their `static.py`. It needs Triton's compiler for NVIDIA, no GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="session")
def static():
    """The command, as a module."""
    backends = pytest.importorskip("triton.backends", reason="needs Triton").backends
    if "nvidia" not in backends:
        pytest.skip("this Triton has no compiler for NVIDIA")
    spec = importlib.util.spec_from_file_location("benchmark_static", BENCHMARKS / "static.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
