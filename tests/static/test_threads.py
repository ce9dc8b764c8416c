"""ComfyUI's *MultiGPU CFG Split* calls from one thread for each GPU: the first calls of a kernel come at once."""

import threading
from types import SimpleNamespace

import pytest
import torch

GPUS = {"one GPU": ["sm_80", "sm_80"], "two GPUs": ["first sm_80", "second sm_80"]}


class Machine:
    """GPUs that are not here, and two threads that call.

    Attributes:
        compiled: (kernel, whether it was found in the cache on disk). loaded: (device, kernel).
        launched: (device, what was loaded of a kernel).
    """

    def __init__(self, monkeypatch, cache):
        import triton
        from offline_gpu import OfflineGPU

        from liteattention.kernels import triton_launch

        self.compiled, self.loaded, self.launched = [], [], []
        self._current, self._threads, self._launch = threading.local(), [], triton_launch
        monkeypatch.setattr(triton_launch, "architecture", lambda device: "sm_80")
        monkeypatch.setattr(triton_launch, "_compiled", set())
        for kernel in (triton_launch.tile_list_kernel, triton_launch.attention_kernel):
            kernel.device_caches.clear()
        monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
        monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, metadata, cache_hit, **times:
                            self.compiled.append((metadata["name"], cache_hit)))
        self._gpu = OfflineGPU("sm_80")
        self._gpu.get_current_device = lambda: self._current.device
        self._gpu.launcher_cls = lambda source, metadata: lambda *arguments: self.launched.append(
            (self._current.device, arguments[4]))
        self._gpu.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda device: {
            "max_shared_mem": 2**30, "multiprocessor_count": 1})

    def _load(self, name, binary, shared, device):
        """In the first thread: the second one starts, and gets as far as it can meanwhile."""
        self.loaded.append((device, name))
        first, second = self._threads
        if threading.current_thread() is first:
            if second.ident is None:
                second.start()
            second.join(0.5)
        return name, name, 0, 0, 1024

    def call(self, devices):
        """One call in each of two threads; the second one starts while the first loads its first kernel."""
        self._threads = [threading.Thread(target=self._call, args=(device,)) for device in devices]
        with self._gpu:
            self._threads[0].start()
            for thread in self._threads:
                thread.join()

    def _call(self, device):
        from liteattention.kernels import SkipMask, Workspace

        self._current.device = device
        q, k, v, out = (torch.empty(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(4))
        self._launch.triton_attention(q, k, v, out, None, [(SkipMask.full(1, 2, 300), 0)], [False], -10.0, True, None,
                                      0.125, Workspace(), None)


@pytest.mark.parametrize("devices", GPUS.values(), ids=GPUS)
def test_a_kernel_is_compiled_once_and_loaded_once_on_each_gpu(static, monkeypatch, tmp_path, devices):
    machine = Machine(monkeypatch, tmp_path)
    machine.call(devices)
    names = ["tile_list_kernel", "attention_kernel"]
    again = [] if devices[0] == devices[1] else [(name, True) for name in names]
    assert machine.compiled == [(name, False) for name in names] + again
    assert machine.loaded == [(device, name) for device in dict.fromkeys(devices) for name in names]
    assert machine.launched == [(device, name) for device in devices for name in names]
