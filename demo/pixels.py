"""Latents of the tiny demo model as pictures, and its prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

PROMPTS = Path(__file__).parent / "prompts.safetensors"

# Mean and standard deviation per channel of the Wan 2.1 VAE's latents (Wan-AI/Wan2.1, vae config): ComfyUI stores
# latents unnormalised.
_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def from_comfy_latent(latent: Tensor) -> Tensor:
    """A latent as ComfyUI hands it around, [B, 16, T, h, w], in the model's own space."""
    mean, std = (torch.tensor(x, dtype=latent.dtype, device=latent.device).view(1, -1, 1, 1, 1) for x in (_MEAN, _STD))
    return (latent - mean) / std


def decode(latent: Tensor) -> Tensor:
    """RGB frames, float32 [T, 2h, 2w, 3] in 0..1, of the first clip of a latent [B, 16, T, h, w] in model space.

    The first 12 channels are colour x (row, column) inside a 2 x 2 pixel block, scaled by 1.6 (see CARD.md).
    """
    pixels = latent[0, :12].float().unflatten(0, (3, 2, 2)) / 1.6
    # [colour, row, column, T, h, w] -> [T, h, row, w, column, colour]
    frames = pixels.permute(3, 4, 1, 5, 2, 0).flatten(3, 4).flatten(1, 2)
    return ((frames + 1) / 2).clamp(0, 1).contiguous()


def prompt_tokens(shape: int, count: int, speed: int) -> Tensor:
    """Conditioning, float32 [1, 4, 4096].

    Args:
        shape: 0 disc, 1 square. count: 1..4. speed: 0..2.

    Raises:
        ValueError: a value outside its range.
    """
    for name, value, allowed in (("shape", shape, range(2)), ("count", count, range(1, 5)), ("speed", speed, range(3))):
        if value not in allowed:
            raise ValueError(f"{name} is {value}; it is a whole number from {allowed[0]} to {allowed[-1]}")
    attributes = load_file(PROMPTS)["attributes"]
    rows = [shape, 2 + count - 1, 6 + speed, 15]
    return attributes[rows].unsqueeze(0)


def empty_prompt() -> Tensor:
    """The unconditional conditioning, float32 [1, 4, 4096]."""
    return torch.zeros(1, 4, 4096)
