"""Whether Triton can run: asked once, in a child process, remembered."""

import json
import subprocess
import sys

import pytest
import torch

from liteattention.kernels import triton_probe
from liteattention.kernels.triton_probe import TritonVerdict, cached_verdict, install_hint, run_selftest

YES = TritonVerdict(True)
NO = TritonVerdict(False, "no")
IDENTITY = ["GPU", "driver", "torch", "triton"]


class Child:
    def __init__(self, *verdicts):
        self.verdicts = list(verdicts)
        self.asked = 0

    def __call__(self, device):
        self.asked += 1
        return self.verdicts.pop(0)


@pytest.mark.parametrize("verdict", [YES, NO])
def test_a_verdict_is_reached_once_per_machine(tmp_path, verdict):
    child = Child(verdict)
    for _ in range(3):
        assert cached_verdict(IDENTITY, "cuda:0", tmp_path / "new", child) == verdict
    assert child.asked == 1
    assert cached_verdict([*IDENTITY, "newer driver"], "cuda:0", tmp_path / "new", Child(YES)) == YES


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"usable": true}', b"\xff\xfe"])
def test_a_damaged_cache_costs_one_more_test(tmp_path, content):
    cached_verdict(IDENTITY, "cuda:0", tmp_path, Child(NO))
    file, = tmp_path.iterdir()
    file.write_bytes(content)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, Child(YES)) == YES
    assert json.loads(file.read_text())["usable"] is True


def test_a_cache_that_cannot_be_written_is_no_problem(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert cached_verdict(IDENTITY, "cuda:0", blocked / "folder", Child(YES)) == YES


def ended(code, out="", err=""):
    return lambda *args, **kwargs: subprocess.CompletedProcess(args, code, out, err)


def test_how_a_child_can_end(monkeypatch):
    cases = [
        (ended(0), TritonVerdict(True)),
        (ended(-11), TritonVerdict(False, "the Triton self-test on this GPU ended with signal 11: it said nothing")),
        (ended(1, err="Traceback\nRuntimeError: bad\n\n"),
         TritonVerdict(False, "the Triton self-test on this GPU ended with exit code 1: RuntimeError: bad")),
    ]
    for run, verdict in cases:
        monkeypatch.setattr(subprocess, "run", run)
        assert run_selftest("cuda:0") == verdict

    def too_slow(*args, **kwargs):
        raise subprocess.TimeoutExpired("child", 300)

    def cannot_start(*args, **kwargs):
        raise OSError("no such file")

    monkeypatch.setattr(subprocess, "run", too_slow)
    assert "did not finish in 300 s" in run_selftest("cuda:0").reason
    monkeypatch.setattr(subprocess, "run", cannot_start)
    assert "could not be started: no such file" in run_selftest("cuda:0").reason


def test_the_real_self_test_passes(device):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    assert run_selftest(str(device)) == YES


def test_the_real_self_test_notices_a_wrong_kernel(tmp_path, monkeypatch, device):
    """The child with one number of the kernel changed does not pass."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    for source in triton_probe._CHILD.parent.glob("*.py"):
        text = source.read_text()
        if source.name == "triton_attention.py":
            assert "alpha = tl.math.exp2(m_i - m_safe)" in text
            text = text.replace("alpha = tl.math.exp2(m_i - m_safe)", "alpha = tl.math.exp2(m_i - m_safe) * 0.5")
        (tmp_path / source.name).write_text(text)
    monkeypatch.setattr(triton_probe, "_CHILD", tmp_path / "selftest.py")
    verdict = run_selftest(str(device))
    assert not verdict.usable and "result differs" in verdict.reason


@pytest.mark.parametrize("system, version, hip, expected", [
    ("Windows", "2.11.0+cu130", None, '-m pip install "triton-windows==3.6.*"'),
    ("Windows", "2.8.0+cu128", None, '-m pip install "triton-windows==3.4.*"'),
    ("Windows", "3.0.0", None, "-m pip install triton-windows"),
    ("Darwin", "2.11.0", None, "Triton does not exist for macOS"),
    ("Linux", "2.11.0+cu130", None, "-m pip install triton"),
    ("Linux", "2.11.0+rocm7", "7.0", "reinstall torch"),
])
def test_the_hint_names_package_and_command(monkeypatch, system, version, hip, expected):
    monkeypatch.setattr(triton_probe.platform, "system", lambda: system)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert expected in install_hint()
    if "-m pip" in expected:
        assert sys.executable in install_hint()


def test_devices_that_triton_does_not_know(monkeypatch):
    assert "does not run on mps" in triton_probe.triton_verdict(torch.device("mps")).reason
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "only in its interpreter" in triton_probe.triton_verdict(torch.device("cpu")).reason
