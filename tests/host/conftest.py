"""A real ComfyUI in this process, on the CPU, with the tiny demo model; without one these tests are left out.

LITEATTENTION_TEST_CONTRACT=newer lays the call contract of ComfyUI 0.40 and later over it (newer_core.py).
"""

import os
import sys
from pathlib import Path

import pytest
from comfyui import find_comfyui

COMFY = find_comfyui()
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("family_kit")
if COMFY is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # First on the path, and told to use the CPU before anything of it is imported.
    sys.path.insert(0, str(COMFY))
    _argv, sys.argv = sys.argv, [str(COMFY / "main.py"), "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = _argv


def pytest_terminal_summary(terminalreporter):
    if COMFY is None:
        terminalreporter.write_line(
            "SKIPPED tests/host: no ComfyUI found (COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI)")


def pytest_sessionfinish(session, exitstatus):
    if COMFY is None and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session", autouse=True)
def contract():
    """How networks call attention: as in this ComfyUI, or as in newer ones."""
    if os.environ.get("LITEATTENTION_TEST_CONTRACT") != "newer":
        yield
        return
    import newer_core

    if not newer_core.supported():
        pytest.skip("this ComfyUI has no containers")
    with pytest.MonkeyPatch.context() as patch:
        newer_core.install(patch)
        yield


@pytest.fixture(scope="session")
def kit(model_folder):
    """Model, conditionings and samplers (see host_kit.py)."""
    from host_kit import Kit

    return Kit(model_folder)


@pytest.fixture
def runs(monkeypatch):
    """Every run that the patched models open, in order, each with a snapshot of its masks taken at its end."""
    from liteattention.runtime import SamplingRun

    opened = []

    class Watched(SamplingRun):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.passes, self.bits = {}, {}
            opened.append(self)

        def close(self):
            for key, rows in self.masks.all_masks().items():
                for row, mask in rows.items():
                    self.passes[key, row] = mask.passes[0]
                    self.bits[key, row] = mask.to_bool().clone()
            return super().close()

    monkeypatch.setattr(sys.modules["liteattention.host.attach"], "SamplingRun", Watched)
    return opened
