"""Which calls the kernel for Hopper takes: of its own kind alone, where it is asked for and has passed its test."""

import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this system")
from liteattention.kernels import triton_hopper_launch, triton_probe  # noqa: E402
from liteattention.kernels.forms import AMD, NVIDIA  # noqa: E402
from liteattention.kernels.triton_hopper_launch import takes_hopper  # noqa: E402
from liteattention.kernels.triton_probe import TritonVerdict  # noqa: E402

DEVICE = torch.device("cuda:0")


@pytest.fixture
def hopper(monkeypatch):
    """An H100 that is not here, whose user asks for the kernel, which passes its test."""
    def on(arch="sm_90", version="3.6.1", verdict=TritonVerdict(True)):  # noqa: B008
        monkeypatch.setattr(triton_hopper_launch, "architecture", lambda device: arch)
        monkeypatch.setattr(triton_hopper_launch.triton, "__version__", version)
        monkeypatch.setattr(triton_hopper_launch, "hopper_verdict", lambda device: verdict)

    triton_hopper_launch._passes.cache_clear()
    monkeypatch.setenv("LITEATTENTION_HOPPER", "1")
    on()
    yield on
    triton_hopper_launch._passes.cache_clear()


@pytest.mark.parametrize("head_dim, dtype, int8, taken", [
    (128, torch.bfloat16, False, True), (64, torch.float16, False, True), (96, torch.bfloat16, False, False),
    (128, torch.float32, False, False), (128, torch.bfloat16, True, False)])
def test_calls_of_its_kind(hopper, head_dim, dtype, int8, taken):
    assert takes_hopper(DEVICE, head_dim, dtype, int8) is taken


@pytest.mark.parametrize("arch", [arch for arch in (*NVIDIA, *AMD, "cpu") if arch != "sm_90"])
def test_no_other_gpu_is_asked(hopper, arch):
    hopper(arch, verdict=None)
    assert not takes_hopper(DEVICE, 128, torch.bfloat16, False)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_unasked_it_is_not_even_tested(hopper, monkeypatch, value):
    hopper(verdict=None)
    monkeypatch.delenv("LITEATTENTION_HOPPER")
    if value is not None:
        monkeypatch.setenv("LITEATTENTION_HOPPER", value)
    assert not takes_hopper(DEVICE, 128, torch.bfloat16, False)


@pytest.mark.parametrize("version, verdict, said", [
    ("3.7.0", None, "it is made for Triton 3.6, and this is 3.7.0"),
    ("3.6.0", TritonVerdict(False, "result differs"), "result differs")])
def test_why_it_is_not_used_is_logged_once(hopper, caplog, version, verdict, said):
    hopper(version=version, verdict=verdict)
    for _ in range(3):
        assert not takes_hopper(DEVICE, 128, torch.bfloat16, False)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"LiteAttention: the kernel for Hopper (LITEATTENTION_HOPPER) cannot be used, the usual one is: {said}")


def test_a_hang_is_a_verdict_of_its_own(monkeypatch, tmp_path):
    """A child of its own, with a time limit; what it says is kept apart from the verdict on the other kernels."""
    class Properties:
        name = "H100"

    asked = []

    def hangs(command, **options):
        asked.append((command[2:], options["timeout"]))
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(subprocess, "run", hangs)
    monkeypatch.setenv("LITEATTENTION_CACHE", str(tmp_path))
    for _ in range(2):
        verdict = triton_probe.hopper_verdict(DEVICE)
        assert verdict == TritonVerdict(False, "the Triton self-test did not finish in 300 s")
    assert asked == [(["cuda:0", "hopper"], 300)]
    others = TritonVerdict(True)
    assert triton_probe.cached_verdict(triton_probe._identity(0), "cuda:0", run_child=lambda device: others) == others
