"""Compiled PTX executed on a CPU; a process of its own, because Triton decides at its import whether it compiles."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
