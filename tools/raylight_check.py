"""Run the tiny model in Raylight's own workers, dense and with LiteAttention: python tools/raylight_check.py RAYLIGHT

RAYLIGHT is a checkout of Raylight. On the CPU, with gloo in the place of NCCL and `--ulysses` x `--cfg` workers; no
part of Raylight is changed. It checks that every self-attention is sparse on every rank, that all ranks end with the
same latent, and that `enabled` off gives the dense one again. Not part of the tests: Raylight is not on PyPI.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402

STEPS, LAYERS = 4, 5
SIZE = (7, 20, 20)


def on_cpu() -> None:
    """In a worker before anything else: what asks for a GPU gets a CPU."""
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
        import raylight  # noqa: F401  its shortened xfuser
        import xfuser.envs as envs

        envs._is_cuda = envs._is_hip = lambda: False
        envs.get_device = lambda rank: torch.device("cpu")
        envs.get_torch_distributed_backend = lambda: "gloo"
        import xfuser.core.long_ctx_attention.ring.ring_flash_attn  # noqa: F401
    finally:
        cuda.is_available = available


def parallel(ulysses: int, cfg: int) -> dict[str, Any]:
    """As Raylight's initializer makes it."""
    world = ulysses * cfg
    return {"is_xdit": True, "is_fsdp": False, "attention": "TORCH_MATH", "sync_ulysses": False, "use_mmap": False,
            "global_world_size": world, "shard_size": world, "use_group_process_group": False, "pp_degree": 1,
            "dp_degree": 1, "ulysses_degree": ulysses, "ring_degree": 1, "cfg_degree": cfg,
            "clear_vram_after_sampling": False, "pipefusion_enabled": False}


def sampled(ray: Any, workers: list) -> list:
    """The latent of every rank, from Raylight's own sampler."""
    import torch

    from liteattention.demo.pixels import empty_prompt, prompt_tokens

    latent = {"samples": torch.zeros(1, 16, *SIZE)}
    positive, negative = ([[tokens, {}]] for tokens in (prompt_tokens(0, 2, 1), empty_prompt()))
    asked = [worker.common_ksampler.remote(1, STEPS, 2.0, "euler", "simple", positive, negative, latent)
             for worker in workers]
    return [result[0]["samples"] for result in ray.get(asked)]


def check(ray: Any, workers: list) -> None:
    """Raises AssertionError."""
    import torch

    from liteattention.host import raylight
    from liteattention.runtime import LiteAttentionConfig, Threshold

    actors = {"workers": workers}
    dense = sampled(ray, workers)
    raylight.apply(actors, LiteAttentionConfig(rule=Threshold(-1.0), min_tokens=128, warmup_steps=1))
    lite = sampled(ray, workers)
    run = raylight.last_run(actors)
    print(run.text())
    raylight.apply(actors, None)
    off = sampled(ray, workers)
    for latents in (dense, lite, off):
        assert all(torch.equal(latents[0], other) for other in latents), "ranks have different latents"
    assert torch.equal(off[0], dense[0]) and not torch.equal(lite[0], dense[0])
    assert run.sparse_calls >= len(workers) * STEPS * LAYERS and not run.notes and run.skipped > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raylight", type=Path, help="checkout of Raylight")
    parser.add_argument("--ulysses", type=int, default=2)
    parser.add_argument("--cfg", type=int, default=1)
    arguments = parser.parse_args()
    source, comfy = (arguments.raylight / "src").resolve(), find_comfyui()
    if comfy is None or not (source / "raylight").is_dir():
        sys.exit("No ComfyUI found, or RAYLIGHT holds no src/raylight.")
    rerun_with_requirements(comfy, always_venv=True)
    paths = [str(comfy), str(source), str(ROOT / "tools")]
    folder = tempfile.TemporaryDirectory(prefix="ray")
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "HOME": folder.name, "OMP_NUM_THREADS": "1",
                   "RAY_USAGE_STATS_ENABLED": "0"}
    sys.path[:0] = paths
    sys.argv = ["main.py", "--cpu"]
    from load_pack import load_pack

    load_pack()
    on_cpu()
    world, ray = arguments.ulysses * arguments.cfg, importlib.import_module("ray")
    with folder:
        ray.init(num_cpus=world + 1, num_gpus=world, include_dashboard=False, _temp_dir=folder.name,
                 _node_ip_address="127.0.0.1", runtime_env={"worker_process_setup_hook": "raylight_check.on_cpu"})
        try:
            from raylight.distributed_worker.ray_worker import make_ray_actor_fn

            given = parallel(arguments.ulysses, arguments.cfg)
            workers = make_ray_actor_fn(world, given)()["workers"]
            model = str(ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors")
            ray.get([worker.load_unet.remote(model, model_options={}) for worker in workers])
            if arguments.ulysses > 1:
                ray.get([worker.patch_usp.remote() for worker in workers])
            if arguments.cfg > 1:
                ray.get([worker.patch_cfg.remote() for worker in workers])
            check(ray, workers)
        finally:
            ray.shutdown()
    print("Every self-attention was sparse on every rank, and off gives the dense latent again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
