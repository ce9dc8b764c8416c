"""Run a Wan model in Raylight's own workers, dense and with LiteAttention: python tools/raylight_check.py RAYLIGHT

RAYLIGHT is a checkout of Raylight, which is not changed. It checks that all ranks end with the same latent and that
`enabled` off gives the dense one again, and prints for every rank the skipped share and the seconds that attention and
the exchange before and after it took. One worker for each of `--ulysses` x `--cfg`.

On the CPU (the default), with the tiny model and gloo in the place of NCCL, it also checks that every self-attention is
sparse. On GPUs, which nobody has done yet: --gpus --model FILE --size 21 60 104 --steps 20 --rule-threshold -10.
Not part of the tests, because Raylight is not on PyPI.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402

TINY = ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors"
CLOCK: Counter[str] = Counter()
"""Seconds in this worker."""


def on_gpu() -> None:
    """In a worker before anything else."""
    import raylight  # noqa: F401  its shortened xfuser

    keep_time()


def on_cpu() -> None:
    """The same; what asks for a GPU gets a CPU."""
    import torch
    import torch.distributed as dist

    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401  before torch pretends to have a GPU

    torch.set_num_threads(1)
    cuda = torch.cuda
    cuda.get_device_capability = lambda *device: (8, 0)
    cuda.device_count = lambda: 1
    cuda.synchronize = cuda.set_device = cuda.empty_cache = lambda *device: None
    start, mesh = dist.init_process_group, dist.device_mesh.init_device_mesh
    dist.init_process_group = lambda backend=None, **given: start("gloo", **given)
    dist.device_mesh.init_device_mesh = lambda device, **given: mesh("cpu", **given)
    available, cuda.is_available = cuda.is_available, lambda: True
    try:
        import raylight  # noqa: F401
        import xfuser.envs as envs

        envs._is_cuda = envs._is_hip = lambda: False
        envs.get_device = lambda rank: torch.device("cpu")
        envs.get_torch_distributed_backend = lambda: "gloo"
        keep_time()
    finally:
        cuda.is_available = available


def keep_time() -> None:
    """Around the exchange and the local attention of xFuser."""
    import xfuser.core.long_ctx_attention.hybrid.attn_layer as layer
    import xfuser.core.long_ctx_attention.ring as ring

    class Exchange:
        apply = staticmethod(_timed("exchange", layer.SeqAllToAll4D.apply))

    layer.SeqAllToAll4D = Exchange
    ring.xdit_ring_flash_attn_func = _timed("attention", ring.xdit_ring_flash_attn_func)


def _timed(name: str, function: Callable) -> Callable:
    import torch

    def timed(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = function(*args, **kwargs)
        torch.cuda.synchronize()
        sys.modules["raylight_check"].CLOCK[name] += time.perf_counter() - start
        return out

    return timed


def take_time(model: Any) -> dict[str, float]:
    """In a worker: the seconds since the last call."""
    clock = sys.modules["raylight_check"].CLOCK
    taken = dict(clock)
    clock.clear()
    return taken


def parallel(ulysses: int, cfg: int, attention: str) -> dict[str, Any]:
    """As Raylight's initializer makes it."""
    world = ulysses * cfg
    return {"is_xdit": True, "is_fsdp": False, "attention": attention, "sync_ulysses": False, "use_mmap": False,
            "global_world_size": world, "shard_size": world, "use_group_process_group": False, "pp_degree": 1,
            "dp_degree": 1, "ulysses_degree": ulysses, "ring_degree": 1, "cfg_degree": cfg,
            "clear_vram_after_sampling": False, "pipefusion_enabled": False}


def started(ray: Any, arguments: argparse.Namespace) -> list:
    """Raylight's workers, with the model loaded as its loader node does."""
    from raylight.distributed_worker.ray_worker import make_ray_actor_fn

    attention = "TORCH_FLASH" if arguments.gpus else "TORCH_MATH"
    given = parallel(arguments.ulysses, arguments.cfg, attention)
    workers = make_ray_actor_fn(arguments.ulysses * arguments.cfg, given)()["workers"]
    ray.get([worker.load_unet.remote(str(arguments.model), model_options={}) for worker in workers])
    if arguments.ulysses > 1:
        ray.get([worker.patch_usp.remote() for worker in workers])
    if arguments.cfg > 1:
        ray.get([worker.patch_cfg.remote() for worker in workers])
    return workers


def sampled(ray: Any, workers: list, arguments: argparse.Namespace, name: str) -> list:
    """The latent of every rank, from Raylight's own sampler."""
    import torch

    latent = {"samples": torch.zeros(1, 16, *arguments.size)}
    positive, negative = ([[torch.randn(1, 32, 4096, generator=torch.Generator().manual_seed(seed)), {}]]
                          for seed in (1, 2))
    asked = [worker.common_ksampler.remote(1, arguments.steps, 2.0, "euler", "simple", positive, negative, latent)
             for worker in workers]
    latents = [result[0]["samples"] for result in ray.get(asked)]
    clocks = ray.get([worker.model_function_runner_get_values.remote(take_time) for worker in workers])
    for rank, clock in enumerate(clocks):
        print(f"{name}, rank {rank}: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in clock.items()))
    return latents


def check(ray: Any, workers: list, arguments: argparse.Namespace) -> None:
    """Raises AssertionError."""
    import torch

    from liteattention.host import raylight
    from liteattention.runtime import LiteAttentionConfig, Threshold

    actors = {"workers": workers}
    sampled(ray, workers, arguments, "first, loads the model")
    dense = sampled(ray, workers, arguments, "dense")
    raylight.apply(actors, LiteAttentionConfig(rule=Threshold(arguments.rule_threshold),
                                               min_tokens=0 if arguments.gpus else 128))
    lite = sampled(ray, workers, arguments, "lite")
    run = raylight.last_run(actors)
    print("\n".join(run.lines()))
    raylight.apply(actors, None)
    off = sampled(ray, workers, arguments, "off")
    for latents in (dense, lite, off):
        assert all(torch.equal(latents[0], other) for other in latents), "ranks have different latents"
    assert torch.equal(off[0], dense[0]), "off is not dense"
    assert run.sparse_calls and not torch.equal(lite[0], dense[0])
    if not arguments.gpus:
        assert all(reason.expected for reason in run.dense_calls) and not run.notes and run.skipped > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raylight", type=Path, help="checkout of Raylight")
    parser.add_argument("--ulysses", type=int, default=2)
    parser.add_argument("--cfg", type=int, default=1)
    parser.add_argument("--gpus", action="store_true", help="one GPU per worker; else the CPU")
    parser.add_argument("--model", type=Path, default=TINY, help="a Wan text to video model")
    parser.add_argument("--size", type=int, nargs=3, default=(7, 20, 20), help="latent frames, height, width")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rule-threshold", type=float, default=-1.0)
    arguments = parser.parse_args()
    source, comfy = (arguments.raylight / "src").resolve(), find_comfyui()
    if comfy is None or not (source / "raylight").is_dir():
        sys.exit("No ComfyUI found, or RAYLIGHT holds no src/raylight.")
    rerun_with_requirements(comfy, always_venv=not arguments.gpus)
    world, paths = arguments.ulysses * arguments.cfg, [str(comfy), str(source), str(ROOT / "tools")]
    sys.path[:0] = paths
    sys.argv = ["main.py", *([] if arguments.gpus else ["--cpu"])]
    from load_pack import load_pack

    load_pack()
    hook = "on_gpu" if arguments.gpus else "on_cpu"
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: sockets lie in it
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        getattr(importlib.import_module("raylight_check"), hook)()
        ray = importlib.import_module("ray")
        ray.init(num_cpus=world + 1, num_gpus=None if arguments.gpus else world, include_dashboard=False,
                 _temp_dir=folder, runtime_env={"worker_process_setup_hook": f"raylight_check.{hook}"})
        try:
            check(ray, started(ray, arguments), arguments)
        finally:
            ray.shutdown()
    print("Passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
