"""Clips of the demo model: discs or squares drift over a checkered gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPEEDS = (0.8, 2.0, 3.5)
"""Pixels from frame to frame in a clip of 64 pixels; in proportion in larger ones."""
SCALE = 1.6
"""Of pixels in -1..1 in a latent, see demo/pixels.py."""
_LUMA = (0.299, 0.587, 0.114)


def clip(shape: int, count: int, speed: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """A latent float32 [16, T, h, w] of a random clip of 2h x 2w pixels that fits a prompt (see `prompt_tokens`)."""

    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    frames, height, width = size[0], 2 * size[1], 2 * size[2]
    side = min(height, width)
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, height, width)), indexing="ij")
    angle = number(0, 2 * math.pi)
    ramp = 0.5 + ((x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)) / math.sqrt(2)
    first, second = (_colour(number(0, 1), 0.45, 0.45).view(3, 1, 1, 1) for _ in range(2))
    checks = torch.tanh(4 * torch.sin(x * (math.pi / 8)) * torch.sin(y * (math.pi / 8)))
    pixels = first + ramp * (second - first) + 0.12 * checks
    hue = number(0, 1)
    for i in range(count):
        radius = number(0.14, 0.2) * side
        angle, step = number(0, 2 * math.pi), SPEEDS[speed] * side / 64 * number(0.85, 1.15)
        # Shapes leave at one edge and come back at the other.
        dx, dy = ((at - number(0, 1) * n - step * toward * t + n / 2) % n - n / 2
                  for at, n, toward in ((x, width, math.cos(angle)), (y, height, math.sin(angle))))
        away = (dx.square() + dy.square()).sqrt() if shape == 0 else torch.maximum(dx.abs(), dy.abs())
        rings = 0.35 * torch.tanh(3 * torch.sin(away * (2 * math.pi / 9)))
        colour = _colour(hue + i / count + number(-0.05, 0.05), 1.0, 0.85).view(3, 1, 1, 1)
        pixels = pixels + torch.sigmoid(2 * (radius - away)) * (colour * (0.65 + rings) - pixels)
    return encode(pixels)


def _colour(hue: float, saturation: float, value: float) -> Tensor:
    """[3] in -1..1."""
    channel = torch.tensor([(5 + 6 * hue) % 6, (3 + 6 * hue) % 6, (1 + 6 * hue) % 6])
    return 2 * value * (1 - saturation * torch.minimum(channel, 4 - channel).clamp(0, 1)) - 1


def encode(pixels: Tensor) -> Tensor:
    """Pixels [3, T, 2h, 2w] in -1..1 -> latent [16, T, h, w]: what `decode` shows, and four features of the luma."""
    # [3, T, h, row, w, column] -> [colour, row, column, T, h, w]
    cells = pixels.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4)
    luma = (cells * torch.tensor(_LUMA).view(3, 1, 1, 1, 1, 1)).sum(0)
    mean = luma.mean((0, 1))
    later = torch.cat([mean[1:], mean[-1:]])
    features = torch.stack([luma[:, 1].mean(0) - luma[:, 0].mean(0), mean, luma[1].mean(0) - luma[0].mean(0),
                            later - mean])
    return SCALE * torch.cat([cells.flatten(0, 2), features])


def batch(count: int, size: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random clips [count, 16, T, h, w] and their prompts [count, 4, 4096]."""
    from liteattention.demo.pixels import prompt_tokens

    prompts = [tuple(int(torch.randint(n, (), generator=generator)) for n in (2, 4, 3)) for _ in range(count)]
    prompts = [(shape, 1 + number, speed) for shape, number, speed in prompts]
    return (torch.stack([clip(*prompt, size, generator) for prompt in prompts]),
            torch.cat([prompt_tokens(*prompt) for prompt in prompts]))
