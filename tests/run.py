"""Set up and run every test: python tests/run.py [further pytest arguments]

Several processes, because Triton decides at import whether it interprets: the kernels in Triton's interpreter, the
kernels on the GPU where there is one, the kernels compiled for GPUs that are not here (`static`, a minute on two
cores), and everything else, in the ComfyUI that is found (see tools/comfyui.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import comfyui_version, find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402


def main() -> int:
    try:
        comfy_path = find_comfyui()
    except FileNotFoundError as error:
        sys.exit(str(error))
    rerun_with_requirements(comfy_path, always_venv=True)
    if comfy_path is None:
        print("Host tests are left out: no ComfyUI found (COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI).")
    else:
        print(f"Host tests run in ComfyUI {comfyui_version(comfy_path)}.")
    import torch

    pytest = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini"), "-q", *sys.argv[1:]]
    kernels, static = (str(ROOT / "tests" / name) for name in ("kernels", "static"))
    runs = [("style", [sys.executable, "-m", "ruff", "check", str(ROOT)], {}),
            ("kernels, interpreted", [*pytest, kernels], {"TRITON_INTERPRET": "1"})]
    if torch.cuda.is_available():
        runs.append(("kernels, on the GPU", [*pytest, kernels], {"TRITON_INTERPRET": "0"}))
    runs.append(("static gate", [*pytest, static], {"TRITON_INTERPRET": "0"}))
    runs.append(("everything else", [*pytest, str(ROOT / "tests"), f"--ignore={kernels}", f"--ignore={static}"], {}))
    failed = []
    for name, command, environment in runs:
        print(f"\n== {name}", flush=True)
        # Outside the repository: its `nodes` folder must not hide ComfyUI's module of that name.
        if subprocess.call(command, cwd=ROOT / "tests", env={**os.environ, **environment}):
            failed.append(name)
    print(f"\nFailed: {', '.join(failed)}" if failed else "\nAll passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
