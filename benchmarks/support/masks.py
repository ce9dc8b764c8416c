"""Skip masks with the shape of real ones, at an exact density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 128


def head_densities(heads: int, density: float, lowest: float, skew: float = 1.2) -> list[float]:
    """Share of active tiles per head, 0..1, mean `density`: a sigmoid of evenly spread logits.

    Args:
        lowest: no head goes below (the diagonal's share).
        skew: standard deviation of the logits; at 1.2 and a mean of 0.43 the heads lie between 0.1 and 0.85.
    """
    spread = [0.0] if heads == 1 else [skew * 1.73 * (2 * h / (heads - 1) - 1) for h in range(heads)]
    low, high = -30.0, 30.0
    for _ in range(80):
        middle = (low + high) / 2
        values = [max(lowest, 1 / (1 + math.exp(-(middle + x)))) for x in spread]
        low, high = (middle, high) if sum(values) / heads < density else (low, middle)
    return values


def realistic_bits(heads: int, tokens: int, sparsity: float, *, frames: int = 21, seed: int = 0,
                   device: torch.device | str = "cpu") -> Tensor:
    """bool [1, H, QT, QT], True = active; the share of inactive tiles is `sparsity` to the nearest tile.

    A video mask as published ones look: a band around the diagonal, fainter bands at multiples of a frame, a few key
    columns that every query tile needs, noise that makes neighbouring rows differ, and heads from nearly dense to
    nearly diagonal (in shuffled order). The diagonal is always active.

    Args:
        tokens: queries = keys; tiles = ceil(tokens / 128).
        frames: of the video; a frame is tokens / frames long, also where that is no whole number of tiles.

    Raises:
        ValueError: `sparsity` leaves no room for the diagonal.
    """
    n = -(-tokens // TILE)
    total = heads * n * n
    wanted = round((1 - sparsity) * total)
    if not heads * n <= wanted <= total:
        raise ValueError(f"sparsity is {sparsity}; {n} x {n} tiles with their diagonal have 0 to {1 - 1 / n:.3f}")
    generator = torch.Generator().manual_seed(seed)
    densities = head_densities(heads, wanted / total, 1 / n)
    counts = [max(n, min(n * n, round(d * n * n))) for d in densities]
    for h in sorted(range(heads), key=lambda h: abs(counts[h] - n * n / 2)):  # what rounding left over
        change = max(n, min(n * n, counts[h] + wanted - sum(counts))) - counts[h]
        counts[h] += change
    counts = [counts[h] for h in torch.randperm(heads, generator=generator).tolist()]
    position = torch.arange(n, dtype=torch.float32, device=device)
    distance = (position[:, None] - position[None, :]).abs()
    frame = max(1.0, n / frames)
    phase = (distance / frame - (distance / frame).round()).abs() * frame
    bits = torch.zeros(1, heads, n, n, dtype=torch.bool, device=device)
    for h, count in enumerate(counts):
        width = frame * (0.2 + torch.rand(1, generator=generator).item())
        periodic = 0.3 + 0.6 * torch.rand(1, generator=generator).item()
        columns = (torch.rand(n, generator=generator) < 0.03).to(device)
        noise = 0.35 * torch.randn(n, n, generator=generator).to(device)
        score = torch.exp(-distance / width) + periodic * torch.exp(-phase / (0.25 * frame) - distance / n)
        score = score + 1.5 * columns + noise
        score.fill_diagonal_(math.inf)
        bits[0, h].view(-1)[score.flatten().topk(count, sorted=False).indices] = True
    return bits
