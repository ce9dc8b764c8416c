"""A run as one picture: how much it skipped and how fast it was, per step and layer; calls, time, masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .canvas import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    MISSING,
    ORANGE,
    SKY,
    TEXT,
    VERMILION,
    Box,
    Canvas,
    round_up,
    ticks,
    viridis,
)
from .mask_pictures import MaskPicture

WIDTH, HEIGHT = 1600, 1200
GAP, FIGURE, TITLE, LABEL = 16, 58, 34, 27
"""Pixels between panels; sizes of text. The picture is read at a quarter of its size on the node."""
REASONS = 5
"""Reasons that get a bar of their own; the others share one."""
FRAME_LINE_PIXELS = 6


def percent(share: float | None, digits: int = 0) -> str:
    """ "34 %", or "-" for None."""
    return "-" if share is None else f"{share * 100:.{digits}f} %"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 // 10 else f"{count / 1024:.1f} KB"


def draw_run(stats: Mapping[str, Any], masks: Sequence[MaskPicture] = ()) -> torch.Tensor:
    """float32 [1, 1200, 1600, 3] in 0..1.

    Args:
        stats: a run as plain values (`RunSummary.to_dict`).
        masks: at its end; none where it has none.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    inside = canvas.box.inset(GAP, GAP, GAP, GAP)
    if not stats["plan"]:  # of no run
        canvas.text(WIDTH // 2, HEIGHT // 2, stats["headline"], TITLE, TEXT, "mm", inside.width)
        return canvas.tensor()
    inside = _headline(canvas, inside, stats)
    _figures(canvas, Box(inside.left, inside.top, inside.right, inside.top + 140), stats)
    middle = Box(inside.left, inside.top + 140 + GAP, inside.right, inside.top + 550)
    split = inside.left + inside.width * 11 // 20
    _steps(canvas, Box(middle.left, middle.top, split, middle.bottom), stats)
    calls = Box(split + GAP, middle.top, middle.right, middle.bottom - 156 - GAP)
    _calls(canvas, calls, stats)
    _time(canvas, Box(calls.left, calls.bottom + GAP, calls.right, middle.bottom), stats)
    split = inside.left + inside.width * 9 // 20
    _layers(canvas, Box(inside.left, middle.bottom + GAP, split, inside.bottom), stats)
    _masks(canvas, Box(split + GAP, middle.bottom + GAP, inside.right, inside.bottom), stats, masks)
    return canvas.tensor()


def _headline(canvas: Canvas, box: Box, stats: Mapping[str, Any]) -> Box:
    """The summary's first line, its advice below it; what is left of `box`."""
    said, _, advice = stats["headline"].partition("; try: ")
    bad = stats["slower"] or not stats["sparse_calls"]
    canvas.text(box.left, box.top + TITLE // 2, said, TITLE, VERMILION if bad else TEXT, width=box.width)
    if not advice:
        return box.inset(0, TITLE + GAP, 0, 0)
    canvas.text(box.left, box.top + TITLE + LABEL, f"try: {advice}", LABEL, width=box.width)
    return box.inset(0, TITLE + 2 * LABEL, 0, 0)


def _figures(canvas: Canvas, box: Box, stats: Mapping[str, Any]) -> None:
    rule, _, value = stats["rule"].partition(" ")
    speed = "not timed" if stats["speed_up"] is None else f"{stats['speed_up']:.2f}x"
    figures = [(speed, "of dense: slower", VERMILION) if stats["slower"] else (speed, "as fast as dense", SKY),
               (percent(stats["skipped"], 1), "of attention skipped", GREEN),
               (value or "-", f"{rule or 'rule'} (quality)", TEXT),
               (percent(stats["attention_share"]), "attention in a dense run", TEXT)]
    width = (box.width - GAP * (len(figures) - 1)) // len(figures)
    for i, (value, label, color) in enumerate(figures):
        left = box.left + i * (width + GAP)
        canvas.draw.rounded_rectangle((left, box.top, left + width - 1, box.bottom - 1), TITLE // 2, fill=(40, 40, 42))
        middle, room = left + width // 2, width - TITLE
        size = FIGURE
        while size > LABEL and canvas.text_size(value, size)[0] > room:
            size -= 4
        canvas.text(middle, box.top + 58, value, size, color, "mm", room)
        canvas.text(middle, box.top + 116, label, LABEL + 1, FAINT, "mm", room)


def _axis(canvas: Canvas, box: Box, top: float) -> None:
    """Horizontal grid lines of a share from 0 to `top`."""
    for part in (0, 0.5, 1):
        y = box.bottom - part * box.height
        canvas.draw.line((box.left, y, box.right, y), GRID, 2)
        canvas.text(box.left - 12, y, percent(part * top), LABEL, FAINT, "rm")


def _step_labels(canvas: Canvas, box: Box, steps: int) -> None:
    for step in ticks(steps, max(1, box.width // 90)):
        canvas.text(box.left + (step - 0.5) * box.width / steps, box.bottom + 10, str(step), LABEL, FAINT, "mt")


def _steps(canvas: Canvas, box: Box, stats: Mapping[str, Any]) -> None:
    shares = stats["skipped_per_step"]
    inside = canvas.panel(box, "Skipped per step", TITLE, stats.get("rule", "")).inset(90, 20, 10, LABEL + 14)
    top = round_up(max((s for s in shares if s is not None), default=0.1), (0.1, 0.2, 0.4, 0.6, 0.8, 1.0))
    _axis(canvas, inside, top)
    if not shares:
        _nothing(canvas, inside, "no step has finished")
        return
    width = inside.width / len(shares)
    gap = 2 if width >= 8 else 0
    for i, share in enumerate(shares):
        left, right = inside.left + i * width, inside.left + (i + 1) * width - gap
        if share is None:
            canvas.draw.rectangle((left, inside.top, max(left, right - 1), inside.bottom), fill=MISSING)
        elif share > 0:
            canvas.draw.rectangle((left, inside.bottom - min(share, top) / top * inside.height, max(left, right - 1),
                                   inside.bottom), fill=GREEN)
    _step_labels(canvas, inside, len(shares))
    if None in shares:
        canvas.text(inside.right, inside.top - 12, "grey: no attention ran", LABEL - 3, FAINT, "rm")


def _calls(canvas: Canvas, box: Box, stats: Mapping[str, Any]) -> None:
    other = {name: count for name, count in stats["dense_calls"].items() if name in stats["not_self_attention"]}
    dense = sorted(((name, count) for name, count in stats["dense_calls"].items() if name not in other),
                   key=lambda item: -item[1])
    bars = [("sparse", stats["sparse_calls"], GREEN)]
    bars += [(reason, count, BLUE if reason in stats["expected"] else ORANGE) for reason, count in dense[:REASONS]]
    if len(dense) > REASONS:
        bars[-1] = (f"{len(dense) - REASONS + 1} other reasons", sum(count for _, count in dense[REASONS - 1:]), ORANGE)
    total = sum(count for _, count, _ in bars)
    inside = canvas.panel(box, "Self-attention calls", TITLE, "blue: dense as expected" if total else "")
    if not total:
        _nothing(canvas, inside, "none reached LiteAttention")
        return
    height = inside.height / max(len(bars), 3)
    names, most = inside.width * 46 // 100, max(count for _, count, _ in bars)
    numbers = canvas.text_size(str(most), LABEL)[0] + 12
    for i, (name, count, color) in enumerate(bars):
        y = inside.top + (i + 0.5) * height
        canvas.text(inside.left, y, name, LABEL, width=names - 12)
        start, room = inside.left + names, inside.width - names - numbers
        length = max(3 if count else 0, room * count / most)
        if length:
            canvas.draw.rectangle((start, y - height * 0.32, start + length, y + height * 0.32), fill=color)
        canvas.text(start + length + 10, y, str(count), LABEL, FAINT)
    if other:
        canvas.text(inside.left, inside.bottom + 6, "beside these: " + ", ".join(
            f"{count} {name}" for name, count in other.items()), LABEL - 5, FAINT, width=inside.width)


def _time(canvas: Canvas, box: Box, stats: Mapping[str, Any]) -> None:
    saved = stats.get("saved")
    if not saved:
        inside = canvas.panel(box, "Attention time", TITLE, "not timed")
        _nothing(canvas, inside, "no dense call to compare with")
        return
    share = stats.get("attention_share")
    inside = canvas.panel(box, "Attention time", TITLE, f"from {saved['source']}" if share is None
                          else f"{percent(share)} of a dense run")
    dense, lite = saved["dense_seconds"], saved["sparse_seconds"]
    most, height = max(dense, lite), inside.height / 2
    bars = (("dense", dense, SKY), ("lite", lite, VERMILION if lite > dense else GREEN))
    for i, (name, seconds, color) in enumerate(bars):
        y = inside.top + (i + 0.5) * height
        canvas.text(inside.left, y, name, LABEL)
        start, room = inside.left + 90, inside.width - 90 - 130
        canvas.draw.rectangle((start, y - height * 0.3, start + room * max(0, seconds) / most, y + height * 0.3),
                              fill=color)
        canvas.text(start + room * max(0, seconds) / most + 10, y, f"{seconds:.1f} s", LABEL, FAINT)


def _layers(canvas: Canvas, box: Box, stats: Mapping[str, Any]) -> None:
    layers = stats.get("layers") or {}
    steps = max((len(shares) for shares in layers.values()), default=0)
    inside = canvas.panel(box, "Skipped by layer and step", TITLE)
    if not steps:
        _nothing(canvas, inside, "no layer ran sparse")
        return
    names = list(layers)
    shares = np.array([[np.nan if s is None else s for s in layers[name]] + [np.nan] * (steps - len(layers[name]))
                       for name in names])
    known = shares[np.isfinite(shares)]
    top = round_up(float(known.max(initial=0)), (0.1, 0.2, 0.4, 0.6, 0.8, 1.0))
    shown = inside.inset(150, 4, 84, LABEL + 14)
    canvas.cells(shown, viridis(shares / top))
    _step_labels(canvas, shown, steps)
    height = shown.height / len(names)
    every = max(1, math.ceil((LABEL + 8) / height))
    for i in range(0, len(names), every):
        canvas.text(shown.left - 12, shown.top + (i + 0.5) * height, names[i], LABEL, FAINT, "rm", 138)
    bar = Box(shown.right + 14, shown.top, shown.right + 34, shown.bottom)
    canvas.cells(bar, viridis(np.linspace(1, 0, bar.height)[:, None]))
    for part in (0, 1):
        y = bar.bottom - LABEL // 2 - part * (bar.height - LABEL)
        canvas.text(bar.right + 8, y, f"{part * top * 100:.0f}%", LABEL - 3, FAINT)


def _masks(canvas: Canvas, box: Box, stats: Mapping[str, Any], masks: Sequence[MaskPicture]) -> None:
    inside = canvas.panel(box, "Skip masks", TITLE, f"bright: skipped; {_bytes(stats['mask_bytes'])}" if masks else "")
    if not masks:
        _nothing(canvas, inside, "this run has none")
        return
    layers = list(dict.fromkeys(mask.layer for mask in masks))
    columns = [[mask for mask in masks if mask.layer == layer] for layer in layers]
    rows = max(len(column) for column in columns)
    lines = 2 * (LABEL + 4)
    width = inside.width // len(columns)
    side = max(GAP, min(width - GAP, inside.height // rows - lines))
    note = ""
    for c, column in enumerate(columns):
        for r, mask in enumerate(column):
            left = inside.left + c * width + (width - side) // 2
            top = inside.top + r * (inside.height // rows)
            head = "all heads" if mask.head is None else f"head {mask.head}"
            canvas.text(left, top + LABEL // 2, layers[c], LABEL, width=side)
            canvas.text(left, top + LABEL * 3 // 2 + 4, f"{head} {percent(mask.share)}", LABEL - 3, FAINT, width=side)
            note = _one_mask(canvas, Box(left, top + lines, left + side, top + lines + side), mask) or note
    if note:
        canvas.text(inside.right, inside.bottom + 12, note, LABEL - 5, FAINT, "rm")


def _one_mask(canvas: Canvas, box: Box, mask: MaskPicture) -> str:
    """Query tiles from top to bottom, key tiles from left to right; what its lines stand for, if not every frame."""
    canvas.cells(box, viridis(mask.skipped.numpy().astype(np.float64) / 255))
    edges = mask.frame_edges
    if len(edges) < 2:
        return ""
    pixels = min(box.width / mask.tiles[1], box.height / mask.tiles[0]) * (edges[1] - edges[0])
    every = max(1, math.ceil(FRAME_LINE_PIXELS / pixels))
    for edge in edges[::every]:
        x = round(box.left + edge / mask.tiles[1] * box.width)
        y = round(box.top + edge / mask.tiles[0] * box.height)
        if box.left < x < box.right:
            canvas.veil(Box(x, box.top, x + 1, box.bottom), (255, 255, 255, 110))
        if box.top < y < box.bottom:
            canvas.veil(Box(box.left, y, box.right, y + 1), (255, 255, 255, 110))
    return f"lines: every {every} latent frames" if every > 1 else "lines: latent frames"


def _nothing(canvas: Canvas, box: Box, why: str) -> None:
    canvas.text((box.left + box.right) / 2, (box.top + box.bottom) / 2, why, LABEL, FAINT, "mm", box.width)
