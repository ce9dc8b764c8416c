"""Runs of the quality lab: the demo model, its cases, one run under one setting, and what is recorded of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .quality_methods import Method, Setting
from .quality_metrics import quantile, relative_l2, ssim

ROOT = Path(__file__).resolve().parents[2]
CFG, SHIFT = 2.0, 3.0


@dataclass(frozen=True)
class Case:
    """A prompt (see demo/pixels.py), a seed and the latent's frames, rows and columns."""

    prompt: tuple[int, int, int]
    seed: int
    size: tuple[int, int, int]

    @property
    def name(self) -> str:
        shape, count, speed = self.prompt
        return f"{count} {('disc', 'square')[shape]}, speed {speed}, seed {self.seed}, {'x'.join(map(str, self.size))}"


CASES = (Case((0, 2, 1), 3, (9, 32, 32)), Case((0, 4, 0), 5, (9, 24, 24)), Case((1, 3, 2), 11, (9, 32, 32)))
"""2304 tokens, 1296, which neither 64 nor 128 divides, and 2304."""
SMALL_CASES = (Case((0, 1, 1), 1, (3, 16, 16)),)
"""192 tokens."""


@lru_cache(maxsize=1)
def model(device: str):
    """The demo model, once a process."""
    from liteattention.benchmarks.demo_pipeline.wan import load_tiny_wan

    return load_tiny_wan(ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors", device=torch.device(device))


def sample(case: Case, steps: int, device: str, attend: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]) -> Tensor:
    """The latent [1, 16, T, h, w] of a run on the CPU. attend: (q, k, v [B, H, N, D], layer, step) -> [B, H, N, D]."""
    from liteattention.benchmarks.demo_pipeline.sampler import comfy_noise, euler_flow, flow_sigmas
    from liteattention.demo.pixels import empty_prompt, prompt_tokens

    def on_evaluation(step, sigma, latent_shape, rows):
        def attention(q, k, v, heads, layer):
            split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            return attend(*split, layer, step).transpose(1, 2).flatten(2)

        return attention

    wan = model(device)
    with torch.inference_mode():
        noise = comfy_noise((1, 16, *case.size), case.seed).to(device)
        prompts = (x.to(device) for x in (prompt_tokens(*case.prompt), empty_prompt()))
        latent = euler_flow(wan, noise, flow_sigmas(steps, SHIFT).to(device), *prompts, CFG,
                            on_evaluation=on_evaluation)
    return latent.float().cpu()


def dense_latent(case: Case, steps: int, device: str) -> Tensor:
    """The reference: exact attention throughout."""
    return sample(case, steps, device, lambda q, k, v, layer, step: F.scaled_dot_product_attention(q, k, v))


def _means(rows: list[list[float]]) -> list[float]:
    return [round(sum(row) / len(row), 6) for row in rows]


def _columns(rows: Iterable[list[float]]) -> list[tuple[float, ...]]:
    return list(zip(*rows, strict=True))


def run_setting(case: Case, setting: Setting, steps: int, device: str, reference: Tensor,
                measure_every: int = 1) -> dict:
    """One run as a row of the result.

    Args:
        reference: the dense run's latent.
        measure_every: errors and dropped mass are measured at every so many steps, from the second step on (the first
            computes everything).

    Skipped shares are means over all steps, the first included; errors and dropped mass over the measured ones. Per
    step means over layers, per layer means over steps.
    """
    from liteattention.benchmarks.demo_pipeline.clips import psnr
    from liteattention.demo.pixels import decode

    wan = model(device)
    layers = wan.config.num_layers
    method = Method(setting, wan.grid((1, 16, *case.size)))
    measured = range(1, steps, measure_every)
    skipped = [[0.0] * layers for _ in range(steps)]
    errors: dict[int, list[float]] = {step: [0.0] * layers for step in measured}
    dropped = []
    inside = 0.0

    def attend(q, k, v, layer, step):
        nonlocal inside
        start = time.perf_counter()
        got = method.attend(q, k, v, layer, step, step in errors)
        inside += time.perf_counter() - start
        skipped[step][layer] = got.skipped
        if step in errors:
            errors[step][layer] = relative_l2(got.out, got.dense)
            dropped.append(got.dropped.flatten().cpu())
        return got.out

    start = time.perf_counter()
    clip = decode(sample(case, steps, device, attend))
    seconds = time.perf_counter() - start
    expected = decode(reference)
    mass = torch.cat(dropped) if dropped else torch.zeros(1)
    flat = [x for row in errors.values() for x in row] or [0.0]
    return {"case": case.name, "method": setting.curve, "level": setting.level, "tile": setting.tile,
            "kind": setting.kind, "steps": steps, "skipped": sum(map(sum, skipped)) / (steps * layers),
            "psnr_db": psnr(clip, expected), "ssim": ssim(clip, expected),
            "error_mean": sum(flat) / len(flat), "error_max": max(flat),
            "dropped_mean": mass.mean().item(), "dropped_q999": quantile(mass, 0.999), "seconds": seconds,
            "attention_seconds": inside, "skipped_per_step": _means(skipped),
            "skipped_per_layer": _means(_columns(skipped)), "measured_steps": list(measured),
            "error_per_step": _means(list(errors.values())), "error_per_layer": _means(_columns(errors.values()))}


def trace(case: Case, steps: int, device: str, layers: list[int], at_steps: list[int], path: Path) -> str:
    """Record q and k [2, H, N, D] float32 (rows: negative, positive prompt) of a dense run to safetensors.

    Raises:
        ValueError: a layer or step that the run does not have.
    """
    from safetensors.torch import save_file

    wan = model(device)
    for what, numbers, count in (("layer", layers, wan.config.num_layers), ("step", at_steps, steps)):
        for number in numbers:
            if not 0 <= number < count:
                raise ValueError(f"{what} {number} is not in 0..{count - 1}")
    found = {}

    def attend(q, k, v, layer, step):
        if layer in layers and step in at_steps:
            found.update({f"step{step}.layer{layer}.{name}": x.contiguous().cpu() for name, x in (("q", q), ("k", k))})
        return F.scaled_dot_product_attention(q, k, v)

    sample(case, steps, device, attend)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = "x".join(map(str, wan.grid((1, 16, *case.size))))
    save_file(found, path, metadata={"case": case.name, "steps": str(steps), "cfg": f"{CFG:g}", "shift": f"{SHIFT:g}",
                                     "grid": grid, "sm_scale": f"{wan.config.head_dim ** -0.5:.9g}"})
    size = sum(x.nbytes for x in found.values()) / 2**20
    tokens = math.prod(wan.grid((1, 16, *case.size)))
    return f"{path.name}: q, k of {len(found) // 2} calls, {tokens} tokens, {size:.0f} MB"
