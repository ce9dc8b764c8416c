"""A Triton driver for a GPU that is not here: kernels are compiled as on that GPU, and launches do nothing."""

from __future__ import annotations

from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class _NoLaunch:
    """In place of the compiled launcher: takes the same arguments and returns."""

    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        pass


class OfflineGPU(DriverBase):
    """Context in which Triton kernels launched with CPU tensors go through all of Triton but the GPU.

    Args:
        arch: "sm_89", …, "gfx942", …

    What is compiled inside is what a launch with these arguments would run there, specialisations included, so tests
    and benchmarks need no second description of the kernels' signatures.
    """

    launcher_cls = _NoLaunch

    def __init__(self, arch: str):
        self.arch = arch
        self.target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget(
            "hip", arch, 64 if arch.startswith("gfx9") else 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (name, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**30, "multiprocessor_count": 1})

    def __enter__(self) -> OfflineGPU:
        self._before = triton.runtime.driver._active
        triton.runtime.driver.set_active(self)
        return self

    def __exit__(self, *error) -> None:
        triton.runtime.driver._active = self._before

    def compiled(self, kernel) -> list:
        """The kernels that `kernel` (a JITFunction) has been compiled to here, oldest first."""
        return list(kernel.device_caches[self.get_current_device()][0].values())

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.arch  # Triton keeps its compiled kernels per device: one device for each architecture

    def get_current_stream(self, device) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched here")

    def get_active_torch_device(self):
        raise NotImplementedError("there is no such device here")

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs here that could be timed")
