"""Set up and run every test: python tests/run.py [further pytest arguments]

Several processes, because Triton decides at import whether it interprets: the kernels in Triton's interpreter, the
kernels on the GPU where there is one, the kernels compiled for GPUs that are not here (`static`), the same executed on
the CPU where its executor is (`ptx`), the pack in the ComfyUI that is found (`host`, see tools/comfyui.py), and
everything else. A test uses one core, so two processes run at a time, and what they print comes when each is done. With
arguments they run one after the other and print as they go.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    kernels, static, ptx, host = (str(ROOT / "tests" / name) for name in ("kernels", "static", "ptx", "host"))
    others = [f"--ignore={folder}" for folder in (kernels, static, ptx, host)]
    runs = [("style", [sys.executable, "-m", "ruff", "check", str(ROOT)], {}),
            ("in ComfyUI", [*pytest, host], {}),
            ("kernels, interpreted", [*pytest, kernels], {"TRITON_INTERPRET": "1"}),
            ("everything else", [*pytest, str(ROOT / "tests"), *others], {}),
            ("static gate", [*pytest, static], {"TRITON_INTERPRET": "0"}),
            ("compiled PTX, executed", [*pytest, ptx], {"TRITON_INTERPRET": "0"})]
    if torch.cuda.is_available():
        runs.append(("kernels, on the GPU", [*pytest, kernels], {"TRITON_INTERPRET": "0"}))
    live = bool(sys.argv[1:]) or os.cpu_count() == 1

    def call(name: str, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        print(f"\n== {name}{'' if live else ': started'}", flush=True)
        # Outside the repository: its `nodes` folder must not hide ComfyUI's module of that name.
        return subprocess.run(command, cwd=ROOT / "tests", env={**os.environ, **environment}, text=True,
                              encoding="utf-8", errors="replace", stdout=None if live else subprocess.PIPE,
                              stderr=None if live else subprocess.STDOUT)

    failed = []
    with ThreadPoolExecutor(1 if live else 2) as pool:
        started = {pool.submit(call, *run): run[0] for run in runs}
        for done in as_completed(started):
            if not live:
                print(f"\n== {started[done]}\n{done.result().stdout}", flush=True)
            if done.result().returncode:
                failed.append(started[done])
    print(f"\nFailed: {', '.join(failed)}" if failed else "\nAll passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
