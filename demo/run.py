"""The demo: python demo/run.py [--help]. It runs benchmarks/demo_pipeline/run.py; neither file is published."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    command = Path(__file__).resolve().parent.parent / "benchmarks" / "demo_pipeline" / "run.py"
    runpy.run_path(str(command), run_name="__main__")
