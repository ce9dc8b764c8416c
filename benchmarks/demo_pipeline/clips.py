"""Clips of the demo model: how alike two are, and several side by side as a file."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two clips in 0..1; infinite where they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def side_by_side(clips: list[Tensor], labels: list[str], path: Path, height: int = 256) -> None:
    """Write clips [T, H, W, 3] next to each other, each under its label, as an endless WebP at 8 frames a second."""
    from PIL import Image, ImageDraw, ImageFont

    strip = 28
    font = ImageFont.load_default(size=16)
    width = height * clips[0].shape[2] // clips[0].shape[1]
    pictures = []
    for frames in zip(*clips, strict=True):
        picture = Image.new("RGB", (width * len(clips), height + strip), "white")
        draw = ImageDraw.Draw(picture)
        for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
            pixels = Image.fromarray((frame * 255).round().byte().cpu().numpy())
            picture.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (i * width, strip))
            draw.text((i * width + 8, 5), label, fill="black", font=font)
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125, loop=0, lossless=True)
