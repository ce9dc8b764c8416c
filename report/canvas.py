"""A dark canvas with text, colours and axes: Pillow, in one scale for all panels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, PANEL, GRID = (30, 30, 30), (40, 40, 42), (72, 72, 76)
TEXT, FAINT = (235, 235, 235), (165, 165, 170)
MISSING = (58, 58, 62)
"""Cells without a value."""

BLUE, ORANGE, GREEN, YELLOW, SKY, VERMILION, PURPLE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (240, 228, 66), (86, 180, 233), (213, 94, 0), (204, 121, 167))
"""Okabe and Ito's colours, told apart by people who see colours differently (jfly.uni-koeln.de/color)."""

_VIRIDIS = np.array([(68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
                     (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)], dtype=np.float64)
"""matplotlib's viridis at 0, 0.1, ... 1."""


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom are outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def inset(self, left: int, top: int, right: int, bottom: int) -> Box:
        """Smaller by so much at each side, never below one pixel."""
        x, y = self.left + left, self.top + top
        return Box(x, y, max(x + 1, self.right - right), max(y + 1, self.bottom - bottom))


def viridis(values: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of float [...] in 0..1; NaN takes the colour of missing cells."""
    known = np.isfinite(values)
    at = np.clip(np.where(known, values, 0), 0, 1) * (len(_VIRIDIS) - 1)
    low = np.minimum(at.astype(int), len(_VIRIDIS) - 2)
    mixed = _VIRIDIS[low] + (_VIRIDIS[low + 1] - _VIRIDIS[low]) * (at - low)[..., None]
    return np.where(known[..., None], mixed.round(), MISSING).astype(np.uint8)


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # Pillow before 10.1, or built without FreeType: one bitmap font of one size
        return ImageFont.load_default()


def _known_characters(text: str) -> str:
    """Both of Pillow's own fonts have Latin-1; the bitmap one raises at anything else."""
    return text.encode("latin-1", "replace").decode("latin-1")


class Canvas:
    """An image to draw on.

    Args:
        width, height: pixels.
    """

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    @property
    def box(self) -> Box:
        """All of it."""
        return Box(0, 0, *self.image.size)

    def tensor(self) -> torch.Tensor:
        """float32 [1, H, W, 3] in 0..1, as ComfyUI's images."""
        return torch.from_numpy(np.asarray(self.image, dtype=np.float32) / 255)[None]

    def text_size(self, text: str, size: int) -> tuple[int, int]:
        """Width and height (of a line) in pixels."""
        font = _font(size)
        width = font.getlength(_known_characters(text)) if text else 0
        if not isinstance(font, ImageFont.FreeTypeFont):
            width *= size / 11
        return int(np.ceil(width)), size

    def clipped(self, text: str, size: int, width: int) -> str:
        """`text`, or its beginning with dots where it is wider than `width` pixels."""
        if self.text_size(text, size)[0] <= width:
            return text
        while text and self.text_size(text + "...", size)[0] > width:
            text = text[:-1]
        return text.rstrip() + "..." if text else ""

    def text(self, x: float, y: float, text: str, size: int, color: tuple = TEXT, anchor: str = "lm",
             width: int | None = None) -> None:
        """One line. `anchor`: l, m or r, then t, m or b, as the point lies; `width` clips."""
        text = _known_characters(text if width is None else self.clipped(text, size, width))
        if not text:
            return
        font = _font(size)
        if isinstance(font, ImageFont.FreeTypeFont):
            # Ascender and baseline, so that lines do not move with the letters in them.
            self.draw.text((x, y), text, color, font, anchor=anchor.replace("t", "a").replace("b", "s"))
            return
        ink = Image.new("L", (max(1, int(font.getlength(text))), 11), 0)
        ImageDraw.Draw(ink).text((0, 0), text, 255, font)
        ink = ink.resize((max(1, round(ink.width * size / 11)), size), Image.Resampling.BILINEAR)
        left = x - ink.width * {"l": 0, "m": 0.5, "r": 1}[anchor[0]]
        top = y - ink.height * {"t": 0, "m": 0.5, "b": 1}[anchor[1]]
        self.image.paste(Image.new("RGB", ink.size, color), (round(left), round(top)), ink)

    def panel(self, box: Box, title: str, size: int, note: str = "") -> Box:
        """A panel with a title, and `note` at its right; what is left inside."""
        pad = size * 3 // 4
        self.draw.rounded_rectangle((box.left, box.top, box.right - 1, box.bottom - 1), size // 2, fill=PANEL)
        middle, room = box.top + pad + size // 2, box.width - 2 * pad
        self.text(box.left + pad, middle, title, size, width=room)
        left = room - self.text_size(title, size)[0] - size
        small = size * 4 // 5
        if note and left > 4 * size:
            self.text(box.right - pad, middle, note, small, FAINT, "rm", left)
        return box.inset(pad, pad + size * 3 // 2, pad, pad)

    def cells(self, box: Box, pixels: np.ndarray) -> None:
        """uint8 [H, W, 3] over a box: sharp where a cell is a pixel or more, means where cells share a pixel."""
        image = Image.fromarray(np.ascontiguousarray(pixels))
        means = image.resize((min(image.width, box.width), min(image.height, box.height)), Image.Resampling.BOX)
        self.image.paste(means.resize((box.width, box.height), Image.Resampling.NEAREST), (box.left, box.top))

    def photo(self, box: Box, pixels: np.ndarray) -> None:
        """uint8 [H, W, 3] over a box, resampled."""
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize((box.width, box.height), Image.Resampling.LANCZOS)
        self.image.paste(image, (box.left, box.top))

    def veil(self, box: Box, color: tuple[int, int, int, int]) -> None:
        """A rectangle that lets through what is below; `color` with alpha."""
        ImageDraw.Draw(self.image, "RGBA").rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=color)

    def line(self, points: Sequence[tuple[float, float] | None], color: tuple, width: int, dots: int = 0) -> None:
        """A polyline, interrupted at None; dots of so many pixels where there are few, or a point stands alone."""
        run: list[tuple[float, float]] = []
        for point in [*points, None]:
            if point is not None:
                run.append(point)
                continue
            if len(run) > 1:
                self.draw.line(run, color, width, joint="curve")
            for x, y in run if dots and (len(points) <= 40 or len(run) == 1) else ():
                self.draw.ellipse((x - dots, y - dots, x + dots, y + dots), fill=color)
            run = []


def ticks(count: int, most: int) -> list[int]:
    """Numbers out of 1..count at distances of 1, 2, 5, 10, ..., at most so many."""
    distance = next(n * 10 ** power for power in range(12) for n in (1, 2, 5) if count <= most * n * 10 ** power)
    return list(range(distance, count + 1, distance))


def round_up(value: float, steps: Sequence[float]) -> float:
    """The first of `steps` that is not below `value`, else the last."""
    return next((step for step in steps if value <= step), steps[-1])
