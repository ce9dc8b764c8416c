"""Can Triton run here? Asked once per machine, in a child process, and the verdict kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .compiler_trouble import explained
from .system import run_script, setting, user_cache_dir

log = logging.getLogger("LiteAttention")

_CHILD_TIMEOUT_S = 300
_REFUSAL_LASTS_S = 24 * 3600
"""A failure may have had a passing cause (a full GPU, a driver being updated): it is tried again a day later."""
_CHILD = Path(__file__).with_name("selftest.py")


@dataclass(frozen=True)
class TritonVerdict:
    """`usable`, and otherwise `reason`: one sentence for the user with what to do.

    Attributes:
        pooled: whether that holds for pooled keys and values, too; if not, `reason` says why.
    """

    usable: bool
    reason: str = ""
    pooled: bool = True


def triton_verdict(device: torch.device) -> TritonVerdict:
    """Whether the Triton backend can run on `device`.

    The first question on a machine (per GPU, driver, torch, Triton and version of these kernels) starts a child
    process that compiles and checks small calls, because a launch on an unsuited driver can end the process.
    Later ones read the cached verdict. On a CPU only Triton's interpreter runs (TRITON_INTERPRET=1).
    """
    if device.type == "cpu":
        if setting("TRITON_INTERPRET") != "1":
            return TritonVerdict(False, "Triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1)")
        return TritonVerdict(True) if importlib.util.find_spec("triton") else TritonVerdict(False, install_hint())
    if device.type != "cuda":
        return TritonVerdict(False, f"Triton does not run on {device.type} devices")
    return _device_verdict(device.index if device.index is not None else torch.cuda.current_device())


def hopper_verdict(device: torch.device) -> TritonVerdict:
    """The same for the kernel that is made for Hopper, whose barriers can hang a GPU if they are wrong: the child's
    time limit ends it, and a hang is a verdict."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return cached_verdict([*_identity(index), "hopper"], f"cuda:{index}", run_child=_run_hopper_selftest)


def _run_hopper_selftest(device: str) -> TritonVerdict:
    problem = _problem(device, "hopper")
    return TritonVerdict(not problem, problem)


@lru_cache(maxsize=None)
def _device_verdict(index: int) -> TritonVerdict:
    if importlib.util.find_spec("triton") is None:
        return TritonVerdict(False, install_hint())
    properties = torch.cuda.get_device_properties(index)
    if not torch.version.hip and properties.major < 8:
        return TritonVerdict(False, f"{properties.name} (sm_{properties.major}{properties.minor}) is older than "
                                    "sm_80, the first that the kernels are made for")
    return cached_verdict(_identity(index), f"cuda:{index}")


def _identity(index: int) -> list[str]:
    """What a verdict holds for."""
    return [torch.cuda.get_device_properties(index).name, str(torch.version.cuda or torch.version.hip),
            torch.__version__, " ".join(triton_package() or ("unknown",)), _driver_version(), _source_hash()]


def cached_verdict(identity: list[str], device: str, cache_dir: Path | None = None,
                   run_child: Callable[[str], TritonVerdict] | None = None) -> TritonVerdict:
    """The verdict stored for `identity`, or else that of a child process, which is then stored.

    A cache that cannot be read or written costs time, nothing else.
    """
    folder = cache_dir or user_cache_dir()
    path = folder / f"triton-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        verdict = TritonVerdict(held["usable"] is True, str(held["reason"]), held["pooled"] is True)
        if (verdict.usable and verdict.pooled) or time.time() - float(held["time"]) < _REFUSAL_LASTS_S:
            return verdict
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.info("LiteAttention: first use on this machine: a child process compiles and checks the kernels on %s", device)
    verdict = (run_child or run_selftest)(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps({**asdict(verdict), "time": time.time(), "identity": identity}), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        pass
    return verdict


def run_selftest(device: str) -> TritonVerdict:
    """Compile, run and check small calls on `device` ("cuda:0", "cpu") in a child process; where they fail, once more
    without pooled keys."""
    problem = _problem(device)
    if not problem:
        return TritonVerdict(True)
    if not _problem(device, "plain"):
        return TritonVerdict(True, problem, pooled=False)
    return TritonVerdict(False, problem)


def _problem(*arguments: str) -> str:
    """What a child process with these arguments found wrong, or ""."""
    try:
        child = run_script(_CHILD, *arguments, timeout_s=_CHILD_TIMEOUT_S)
    except TimeoutError:
        return f"the Triton self-test did not finish in {_CHILD_TIMEOUT_S} s"
    except OSError as error:
        return f"the Triton self-test could not be started: {error.strerror or error}"
    if child.code == 0:
        return ""
    ended = f"signal {-child.code}" if child.code < 0 else f"exit code {child.code}"
    return f"the Triton self-test on this GPU ended with {ended}: {explained(child.said)}"


def install_hint() -> str:
    """Which Triton package fits the installed torch on this system, with the command."""
    system = platform.system()
    if system == "Darwin":
        return "Triton does not exist for macOS"
    if system == "Windows":
        version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
        python = sys.executable if " " not in sys.executable else f'"{sys.executable}"'
        return (f"Triton is not installed; for torch {version} on Windows run: {python} -m pip install "
                f"{triton_for_windows(version)}")
    if torch.version.hip:
        return "Triton is not installed; a ROCm build of torch brings it as pytorch-triton-rocm: reinstall torch"
    return f"Triton is not installed; a CUDA build of torch brings it: {sys.executable} -m pip install triton"


def triton_for_windows(torch_version: str) -> str:
    """The requirement for pip: the newest triton-windows that fits torch "2.10".

    Each Triton needs the torch of its own time: 3.2 came with 2.6, and so on to 3.6 with 2.10; since then two versions
    of torch share one Triton. An upper bound holds also where that Triton has not appeared yet.
    """
    found = re.fullmatch(r"2\.(\d+)", torch_version)
    minor = int(found.group(1)) if found else 0
    if minor < 6:
        return "triton-windows"
    return f'"triton-windows<3.{(minor - 4 if minor < 10 else minor // 2 + 1) + 1}"'


def triton_package() -> tuple[str, str] | None:
    """(name, version) of the installed package that brings Triton, or None. Triton is not imported."""
    for name in ("triton", "triton-windows", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _driver_version() -> str:
    reader = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(reader()) if reader else "unknown"


def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
