"""Clips of the second model: a camera pans over a texture, over which another texture may move in a disc."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEXTURES = ("stripes", "checks", "clouds")
DIRECTIONS = ("right", "down", "left", "up")
SPEEDS = (1.5, 3.0, 4.5)
"""Pixels that the camera moves from frame to frame."""
TEXT_DIM, CHANNELS = 16, 12
SCALE = 1.6
"""Of pixels in -1..1 in a latent, as in demo/pixels.py, whose `decode` serves these latents, too."""
_CONSTANT = TEXT_DIM - 1


def prompt_tokens(texture: int, direction: int, speed: int, disc: int) -> Tensor:
    """Conditioning, float32 [1, 4, 16]: one-hot tokens.

    Args:
        texture: of TEXTURES. direction: of DIRECTIONS. speed: of SPEEDS. disc: 1 with another texture in a disc.
    """
    tokens = torch.zeros(1, 4, TEXT_DIM)
    for token, channel in enumerate((texture, 3 + direction, 7 + speed, 10 + disc)):
        tokens[0, token, channel] = tokens[0, token, _CONSTANT] = 1
    return tokens


def empty_prompt() -> Tensor:
    """The unconditional conditioning, float32 [1, 4, 16]."""
    return torch.zeros(1, 4, TEXT_DIM)


class _Draw:
    """Random numbers of one clip."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def number(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def choice(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def colour(self) -> Tensor:
        return 1.8 * torch.rand(3, generator=self.generator) - 0.9


def _waves(draw: _Draw, texture: int) -> list[tuple[float, float, float]]:
    """(angle, wavelength in pixels, phase) of the waves that make a texture."""
    angle, length = draw.number(0, math.pi), draw.number(9, 18)
    if texture == 0:
        return [(angle, length, draw.number(0, 2 * math.pi))]
    if texture == 1:
        return [(angle + turn, length, draw.number(0, 2 * math.pi)) for turn in (0, math.pi / 2)]
    return [(draw.number(0, math.pi), draw.number(12, 36), draw.number(0, 2 * math.pi)) for _ in range(8)]


def _paint(draw: _Draw, texture: int, x: Tensor, y: Tensor) -> Tensor:
    """A texture in two random colours at x, y [T, H, W] -> [3, T, H, W] in -1..1."""
    waves = [torch.sin((x * math.cos(a) + y * math.sin(a)) * (2 * math.pi / length) + phase)
             for a, length, phase in _waves(draw, texture)]
    if texture == 2:
        shade = torch.tanh(1.2 * torch.stack(waves).sum(0))
    else:
        shade = torch.stack([torch.tanh(3 * wave) for wave in waves]).prod(0)
    first, second = (draw.colour().view(3, 1, 1, 1) for _ in range(2))
    return (first + second) / 2 + shade * (first - second) / 2


def clip(prompt: tuple[int, int, int, int], size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """A latent float32 [12, T, h, w] of a random clip of 2h x 2w pixels that fits a prompt (see `prompt_tokens`)."""
    draw = _Draw(generator)
    texture, direction, speed, disc = prompt
    frames, height, width = size[0], 2 * size[1], 2 * size[2]
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, height, width)), indexing="ij")
    angle = direction * math.pi / 2 + draw.number(-0.3, 0.3)
    step = SPEEDS[speed] * draw.number(0.85, 1.15)
    dx, dy = step * math.cos(angle), step * math.sin(angle)
    pixels = _paint(draw, texture, x + dx * t, y + dy * t)
    if disc:
        centre_x, centre_y = (draw.number(0.3, 0.7) * n for n in (width, height))
        radius = draw.number(0.18, 0.28) * min(height, width)
        away_x, away_y = x - centre_x - 0.4 * dx * t, y - centre_y - 0.4 * dy * t
        inside = torch.sigmoid(1.5 * (radius - (away_x.square() + away_y.square()).sqrt()))
        other = _paint(draw, (texture + 1 + draw.choice(2)) % 3, away_x, away_y)
        pixels = pixels + inside * (other - pixels)
    # [3, T, h, row, w, column] -> [colour, row, column, T, h, w]
    cells = pixels.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4)
    return SCALE * cells.flatten(0, 2)


def batch(count: int, size: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random clips [count, 12, T, h, w] and their prompts [count, 4, 16]."""
    draw = _Draw(generator)
    prompts = [tuple(draw.choice(n) for n in (len(TEXTURES), len(DIRECTIONS), len(SPEEDS), 2)) for _ in range(count)]
    return (torch.stack([clip(prompt, size, generator) for prompt in prompts]),
            torch.cat([prompt_tokens(*prompt) for prompt in prompts]))
