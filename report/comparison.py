"""Two clips of the same seed side by side: frames, their difference, PSNR and SSIM of each frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from .canvas import FAINT, GRID, ORANGE, SKY, Box, Canvas, ticks
from .temporal import motion

WIDTH = 1600
GAP, TITLE, LABEL = 16, 34, 27
PLOT = 330
"""Height of the plot."""
MAX_ROW = 420
"""Pixels that a row of frames is high at most."""
WINDOW = 11
"""Pixels of SSIM's gaussian window; smaller where the picture is."""
PSNR_BEST = 60.0
"""dB at the top of the plot; equal frames have no finite PSNR and are drawn there."""


def frame_psnr(dense: Tensor, lite: Tensor) -> list[float | None]:
    """PSNR in dB of each frame of [T, H, W, C] in 0..1; None where two frames are equal."""
    found = []
    for a, b in zip(dense, lite, strict=True):
        error = float((a.double() - b.double()).square().mean())
        found.append(-10 * math.log10(error) if error else None)
    return found


def frame_ssim(dense: Tensor, lite: Tensor) -> list[float]:
    """Mean structural similarity of each frame of [T, H, W, C] in 0..1, over its colours and all windows inside it.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
    """
    from kornia.metrics import ssim

    size = min(WINDOW, *dense.shape[1:3])
    size -= 1 - size % 2
    return [float(ssim(*(x.double().permute(2, 0, 1)[None] for x in pair), size, eps=0.0, padding="valid").mean())
            for pair in zip(dense, lite, strict=True)]


def check_pair(dense: Tensor, lite: Tensor) -> None:
    """Raises:
        ValueError: the clips differ in size, or have no frames.
    """
    sizes = [f"{len(x)} frames of {x.shape[2]} x {x.shape[1]}" for x in (dense, lite)]
    if dense.shape[:3] != lite.shape[:3]:
        raise ValueError(f"dense has {sizes[0]}, lite has {sizes[1]}; the two have to come from the same settings and "
                         "seed. Decode both runs with the same nodes.")
    if not dense.numel():
        raise ValueError(f"dense has {sizes[0]}; there is nothing to compare. Connect the decoded frames.")


def compare_clips(dense: Tensor, lite: Tensor, frames: int = 4, gain: float = 8.0,
                  say: Callable[..., str] = str.format) -> tuple[Tensor, str, dict]:
    """(picture float32 [1, H, 1600, 3] in 0..1, readable summary, plain values).

    Args:
        dense, lite: [T, H, W, C] in 0..1; colours beyond the third are left out.
        frames: how many to show, evenly spread.
        gain: the difference is multiplied by it.
        say: fills a template of the summary, in the user's language.

    Raises:
        ValueError: see `check_pair`.
    """
    check_pair(dense, lite)
    dense, lite = (x[..., :3].detach().float().cpu().clamp(0, 1).nan_to_num() for x in (dense, lite))
    psnr, ssim = frame_psnr(dense, lite), frame_ssim(dense, lite)
    finite = [value for value in psnr if value is not None]
    mean_error = float(np.mean([10 ** (-value / 10) if value is not None else 0.0 for value in psnr]))
    stats = {"frames": len(psnr), "psnr_db": -10 * math.log10(mean_error) if mean_error else None,
             "psnr_db_worst": min(finite) if finite else None, "ssim": float(np.mean(ssim)), "ssim_worst": min(ssim),
             "worst_frame": int(np.argmin([math.inf if v is None else v for v in psnr])) if finite else None,
             "identical_frames": psnr.count(None), "psnr_db_per_frame": psnr, "ssim_per_frame": ssim,
             **motion(dense, lite)}
    count = min(max(1, frames), len(psnr))
    shown = [round(i * (len(psnr) - 1) / max(1, count - 1)) for i in range(count)]
    return _draw(dense, lite, shown, gain, stats), _summary(stats, say), stats


def _summary(stats: dict, say: Callable[..., str]) -> str:
    if stats["psnr_db"] is None:
        return say("All {frames} frames are equal.", frames=stats["frames"])
    lines = [say("PSNR {psnr} dB, SSIM {ssim} over {frames} frames.", psnr=f"{stats['psnr_db']:.1f}",
                 ssim=f"{stats['ssim']:.4f}", frames=stats["frames"]),
             say("Worst frame: {frame} with {psnr} dB; lowest SSIM {ssim}.", frame=stats["worst_frame"],
                 psnr=f"{stats['psnr_db_worst']:.1f}", ssim=f"{stats['ssim_worst']:.4f}"),
             *_motion(stats, say)]
    if stats["identical_frames"]:
        lines.append(say("{frames} frames are equal.", frames=stats["identical_frames"]))
    lines.append(say("Dense is no truth: another seed or precision also gives another video. Look at the frames."))
    return "\n".join(lines)


def _motion(stats: dict, say: Callable[..., str]) -> list[str]:
    """One line about the differences between neighbouring frames; none for a single frame."""
    if stats["motion_psnr_db"] is None:
        return []
    psnr, quiet = f"{stats['motion_psnr_db']:.1f}", stats["quiet_motion"]
    if quiet is None:
        return [say("Motion from frame to frame: {psnr} dB.", psnr=psnr)]
    return [say("Motion from frame to frame: {psnr} dB; {change} where the dense clip is quietest.", psnr=psnr,
                change=f"{quiet:+.0%}")]


def _draw(dense: Tensor, lite: Tensor, shown: Sequence[int], gain: float, stats: dict) -> Tensor:
    names = max(Canvas(1, 1).text_size(name, LABEL)[0] for name in ("dense", "lite", _gain(gain))) + 2 * GAP
    room = (WIDTH - GAP - names) // len(shown) - GAP
    ratio = dense.shape[1] / dense.shape[2]
    high = max(8, min(MAX_ROW, round(room * ratio)))
    wide = max(8, min(room, round(high / ratio)))
    top = GAP + LABEL + GAP
    canvas = Canvas(WIDTH, top + 3 * (high + GAP) + PLOT + GAP)
    difference = ((lite - dense).abs() * gain).clamp(0, 1)
    for row, (name, clip) in enumerate((("dense", dense), ("lite", lite), (_gain(gain), difference))):
        y = top + row * (high + GAP)
        canvas.text(names - GAP, y + high / 2, name, LABEL, anchor="rm")
        for column, frame in enumerate(shown):
            left = names + column * (room + GAP) + (room - wide) // 2
            canvas.photo(Box(left, y, left + wide, y + high), (clip[frame].numpy() * 255).round().astype(np.uint8))
            if not row:
                canvas.text(left + wide / 2, GAP + LABEL / 2, f"frame {frame}", LABEL, FAINT, "mm", room)
    _plot(canvas, Box(GAP, top + 3 * (high + GAP), WIDTH - GAP, canvas.box.bottom - GAP), shown, stats)
    return canvas.tensor()


def _gain(gain: float) -> str:
    return f"diff x {gain:g}"


def _plot(canvas: Canvas, box: Box, shown: Sequence[int], stats: dict) -> None:
    psnr, ssim = stats["psnr_db_per_frame"], stats["ssim_per_frame"]
    mean = "equal" if stats["psnr_db"] is None else f"{stats['psnr_db']:.1f} dB"
    inside = canvas.panel(box, "", TITLE).inset(110, 4, 130, LABEL + 14)
    heading = box.top + TITLE * 5 // 4
    canvas.text(box.left + TITLE * 3 // 4, heading, f"PSNR {mean}", TITLE, SKY)
    canvas.text(box.right - TITLE * 3 // 4, heading, f"SSIM {stats['ssim']:.4f}", TITLE, ORANGE, "rm")
    low = min([20.0, *(10 * math.floor(v / 10) for v in psnr if v is not None)])
    ssim_low = max(-1.0, min(0.9, math.floor(min(ssim) * 10) / 10))
    for part in (0, 0.5, 1):
        y = inside.bottom - part * inside.height
        canvas.draw.line((inside.left, y, inside.right, y), GRID, 2)
        canvas.text(inside.left - 12, y, f"{low + part * (PSNR_BEST - low):.0f} dB", LABEL, SKY, "rm")
        canvas.text(inside.right + 12, y, f"{ssim_low + part * (1 - ssim_low):.2f}", LABEL, ORANGE)

    def at(frame: int, part: float) -> tuple[float, float]:
        x = (frame + 0.5) / len(psnr)
        return inside.left + x * inside.width, inside.bottom - min(1.0, max(0.0, part)) * inside.height

    for frame in shown:
        x = at(frame, 0)[0]
        canvas.draw.line((x, inside.top, x, inside.bottom), GRID, 2)
    canvas.line([at(i, (v - ssim_low) / (1 - ssim_low)) for i, v in enumerate(ssim)], ORANGE, 4, 7)
    canvas.line([at(i, 1 if v is None else (v - low) / (PSNR_BEST - low)) for i, v in enumerate(psnr)], SKY, 4, 7)
    for number in ticks(len(psnr), max(1, inside.width // 90)):
        canvas.text(at(number - 1, 0)[0], inside.bottom + 10, str(number - 1), LABEL, FAINT, "mt")
