"""Whether Triton can run: asked once, in a child process, remembered."""

import json
import subprocess
import sys

import pytest
import torch

from liteattention.kernels import triton_probe
from liteattention.kernels.triton_probe import TritonVerdict, cached_verdict, install_hint, run_selftest

POOLED_LINE = "p = tl.math.exp2(s - m_safe[:, None])"
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


def test_a_refusal_is_tried_again_a_day_later(tmp_path, monkeypatch):
    child = Child(NO, YES)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == NO
    now = triton_probe.time.time()
    monkeypatch.setattr(triton_probe.time, "time", lambda: now + 23 * 3600)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == NO
    monkeypatch.setattr(triton_probe.time, "time", lambda: now + 25 * 3600)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == YES and child.asked == 2
    monkeypatch.setattr(triton_probe.time, "time", lambda: now + 900 * 3600)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == YES and child.asked == 2


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


def test_where_pooled_keys_alone_fail_the_rest_can_be_used(monkeypatch):
    """Whatever ends the first child: a second one does without them."""
    asked = []

    def run(command, **kwargs):
        asked.append(command[2:])
        if "plain" in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "result differs by 3: d64 bf16 mass pooled even\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert run_selftest("cuda:0") == TritonVerdict(
        True, "the Triton self-test on this GPU ended with exit code 1: result differs by 3: d64 bf16 mass pooled even",
        pooled=False)
    assert asked == [["cuda:0"], ["cuda:0", "plain"]]


def test_the_real_self_test_passes(device):
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    assert run_selftest(str(device)) == YES


@pytest.mark.parametrize("file, right, wrong, verdict", [
    ("triton_attention.py", "alpha = tl.math.exp2(m_i - m_safe)", "alpha = tl.math.exp2(m_i - m_safe) * 0.5",
     (False, True)),
    ("triton_pooled.py", POOLED_LINE, f"{POOLED_LINE} * 2", (True, False)),
])
def test_the_real_self_test_notices_a_wrong_kernel(tmp_path, monkeypatch, device, file, right, wrong, verdict):
    """The child with one number of a kernel changed does not pass; where only pooled keys are wrong, the rest does."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    for source in triton_probe._CHILD.parent.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        if source.name == file:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        (tmp_path / source.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(triton_probe, "_CHILD", tmp_path / "selftest.py")
    found = run_selftest(str(device))
    assert (found.usable, found.pooled) == verdict and "differs" in found.reason


@pytest.mark.parametrize("verdict, asked", [(TritonVerdict(True, "bad", pooled=False), 2), (YES, 1)])
def test_pooled_keys_that_failed_are_tried_again_a_day_later(tmp_path, monkeypatch, verdict, asked):
    child = Child(verdict, YES)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == verdict
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == verdict and child.asked == 1
    now = triton_probe.time.time()
    monkeypatch.setattr(triton_probe.time, "time", lambda: now + 25 * 3600)
    assert cached_verdict(IDENTITY, "cuda:0", tmp_path, child) == YES and child.asked == asked


@pytest.mark.parametrize("system, version, hip, expected", [
    ("Windows", "2.11.0+cu130", None, '-m pip install "triton-windows<3.7"'),
    ("Windows", "2.8.0+cu128", None, '-m pip install "triton-windows<3.5"'),
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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there: what the probe asks about it, and a child that must not be needed."""
    class Properties:
        name, major, minor = "GeForce RTX 2080", 7, 5

    def no_child(device):
        raise AssertionError("a child process was started")

    triton_probe._device_verdict.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton_probe, "run_selftest", no_child)
    monkeypatch.setattr(triton_probe.importlib.util, "find_spec", lambda name: object())
    yield monkeypatch
    triton_probe._device_verdict.cache_clear()


def test_gpus_older_than_the_kernels_are_told_so(gpu):
    verdict = triton_probe.triton_verdict(torch.device("cuda:0"))
    assert not verdict.usable and "GeForce RTX 2080 (sm_75) is older than sm_80" in verdict.reason


def test_a_gpu_without_triton_gets_the_hint(gpu):
    gpu.setattr(triton_probe.importlib.util, "find_spec", lambda name: None)
    assert triton_probe.triton_verdict(torch.device("cuda:0")) == TritonVerdict(False, install_hint())


def test_a_new_gpu_is_asked_once_per_process_and_machine(gpu, tmp_path):
    """By a child process on that device; another process of the same machine reads the file."""
    child = Child(YES)
    gpu.setattr(torch.cuda.get_device_properties(0), "major", 8)
    gpu.setattr(triton_probe, "run_selftest", child)
    gpu.setenv("LITEATTENTION_CACHE", str(tmp_path))
    for _ in range(2):
        assert triton_probe.triton_verdict(torch.device("cuda:0")) == YES
    triton_probe._device_verdict.cache_clear()
    assert triton_probe.triton_verdict(torch.device("cuda:0")) == YES and child.asked == 1
    file, = tmp_path.iterdir()
    identity = json.loads(file.read_text())["identity"]
    assert identity[0] == "GeForce RTX 2080" and torch.__version__ in identity


@pytest.mark.parametrize("system, variable", [("Windows", "LOCALAPPDATA"), ("Linux", "XDG_CACHE_HOME")])
def test_verdicts_lie_in_the_users_cache(monkeypatch, tmp_path, system, variable):
    monkeypatch.delenv("LITEATTENTION_CACHE", raising=False)
    monkeypatch.setattr(triton_probe.platform, "system", lambda: system)
    monkeypatch.setenv(variable, str(tmp_path))
    assert triton_probe.user_cache_dir() == tmp_path / "comfyui-liteattention"
    monkeypatch.setenv("LITEATTENTION_CACHE", str(tmp_path / "mine"))
    assert triton_probe.user_cache_dir() == tmp_path / "mine"
