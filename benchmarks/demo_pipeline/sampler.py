"""Euler and Heun sampling of a flow model with classifier-free guidance, step for step as ComfyUI does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .wan import Attention, TinyWan

ROWS = ("negative", "positive")
"""ComfyUI batches the conditionings in reverse: the negative one comes first."""

_TABLE = 1000
"""ComfyUI's flow schedules draw from a table of this many sigmas."""


def flow_sigmas(steps: int, shift: float) -> Tensor:
    """float32 [steps + 1]: scheduler "simple" under ModelSamplingSD3(shift), from 1 down to 0."""
    u = torch.arange(1, _TABLE + 1) / _TABLE
    table = shift * u / (1 + (shift - 1) * u)
    picked = [table[-(1 + int(i * _TABLE / steps))] for i in range(steps)]
    return torch.stack([*picked, torch.zeros(())])


def comfy_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 noise on the CPU, equal to ComfyUI's for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def euler_flow(model: TinyWan, noise: Tensor, sigmas: Tensor, positive: Tensor, negative: Tensor, cfg: float, *,
               heun: bool = False,
               on_evaluation: Callable[[int, float, tuple[int, ...], list[tuple[str, int]]], Attention | None]
               | None = None,
               callback: Callable[[int, Tensor, Tensor, int], None] | None = None) -> Tensor:
    """Sample a latent [B, C, T, h, w].

    Args:
        noise: [B, C, T, h, w] on the model's device.
        sigmas: [steps + 1], falling to 0.
        positive, negative: text tokens [1, L, text_dim] of equal length.
        cfg: guidance; at 1 only the positive pass runs.
        heun: correct each step but the last by a second evaluation at its end.
        on_evaluation: called before every model evaluation with (step, sigma, shape of one latent batch, rows), rows
            naming each batch row as (conditioning, row of the latent batch); may return the attention to use.
        callback: called at the end of every step with (step, denoised, x, steps).
    """
    names = ROWS if cfg != 1 else ROWS[1:]
    context = torch.cat([{"negative": negative, "positive": positive}[name].expand(noise.shape[0], -1, -1)
                         for name in names])
    rows = [(name, row) for name in names for row in range(noise.shape[0])]
    steps = len(sigmas) - 1

    def denoise(x: Tensor, step: int, sigma: Tensor) -> Tensor:
        options = {}
        if on_evaluation is not None:
            attention = on_evaluation(step, float(sigma), tuple(x.shape), rows)
            options = {"attention": attention} if attention is not None else {}
        flow = model(x.repeat(len(names), 1, 1, 1, 1), sigma.expand(len(rows)) * 1000, context, **options)
        predictions = [x - sigma * part for part in flow.chunk(len(names))]
        return predictions[-1] if len(names) == 1 else predictions[0] + cfg * (predictions[1] - predictions[0])

    x = noise * sigmas[0]
    for step in range(steps):
        sigma, after = sigmas[step], sigmas[step + 1]
        denoised = denoise(x, step, sigma)
        slope = (x - denoised) / sigma
        if heun and after > 0:
            end = x + slope * (after - sigma)
            slope = (slope + (end - denoise(end, step, after)) / after) / 2
        if callback is not None:
            callback(step, denoised, x, steps)
        x = x + slope * (after - sigma)
    return x
