"""Pooled keys and values: what represents skipped tiles, a few numbers per tile and per head, from k and v alone.

A skipped tile of n keys enters a row's softmax as one key, the mean of its keys with n times the weight, and as one
value, the mean of its values. What that misses is mostly that the heavier keys of a tile have other values than the
lighter ones. To first order in the score's variation inside a tile this shifts the value by sm_scale * q·C, where C is
the covariance of keys and values inside tiles; one C for a whole head does. The first order overshoots where scores
vary much inside a tile, so the shift is damped by exp(-s / 2), s = sm_scale^2 * q·S·q, with S the covariance of keys
inside tiles: s is the variance of the row's scores inside a tile. The damping is an empirical choice (docs/quality.md).

s also estimates the fraction of a tile's attention that is lost when its pooled key and value take its place, almost
none if its scores are flat, all of it if they vary: 1 - exp(-s). Thresholds of skip tests are divided by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .mask import TILE, tiles

LOST_MIN = 2.0 ** -6
"""The least fraction of a tile's attention that counts as lost."""
RAISED_MAX = 0.5
"""A threshold is raised up to this, so that a row's strongest tile stays."""
_CHUNK = 8
"""Key tiles whose covariances are summed at once: their float32 differences from the means stay in a core's cache."""


@dataclass(frozen=True)
class Pooled:
    """Pooled keys and values of each batch row and head, float32.

    Attributes:
        keys, values: [B, H, KT, D], means over each tile.
        log_counts: [KT], natural log of the number of keys in each tile.
        covariance: [B, H, D, 2 D], `spread` and `shift` side by side.
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    covariance: Tensor

    @property
    def spread(self) -> Tensor:
        """[B, H, D, D], covariance S of keys inside tiles."""
        return self.covariance[..., :self.keys.shape[-1]]

    @property
    def shift(self) -> Tensor:
        """[B, H, D, D], covariance C of keys (rows) and values (columns) inside tiles."""
        return self.covariance[..., self.keys.shape[-1]:]


def pool_tiles(k: Tensor, v: Tensor) -> Pooled:
    """Pooled keys and values of k, v [B, H, N, D] of any dtype, computed in float32."""
    batch, heads, seqlen, head_dim = k.shape
    n_tiles, whole = tiles(seqlen), seqlen // TILE
    means = k.new_empty(2, batch, heads, n_tiles, head_dim, dtype=torch.float32)
    covariance = k.new_zeros(batch * heads, head_dim, 2 * head_dim, dtype=torch.float32)
    inside = k.new_empty(batch, heads, min(_CHUNK, n_tiles), TILE, 2 * head_dim, dtype=torch.float32)
    for first in (*range(0, whole, _CHUNK), *([whole] if whole < n_tiles else [])):
        last = min(first + _CHUNK, whole) if first < whole else n_tiles
        rows = slice(first * TILE, min(last * TILE, seqlen))
        chunk = inside[:, :, :last - first, :(rows.stop - rows.start) // (last - first)]
        for mean, x, difference in zip(means, (k, v), chunk.chunk(2, -1), strict=True):
            x = x[:, :, rows].float().unflatten(2, (last - first, -1))
            torch.mean(x, 3, out=mean[:, :, first:last])
            torch.sub(x, mean[:, :, first:last].unsqueeze(3), out=difference)
        both = chunk.flatten(2, 3).flatten(0, 1)
        covariance.baddbmm_(both[..., :head_dim].mT, both, alpha=1 / seqlen)
    log_counts = torch.full((n_tiles,), math.log(TILE), device=k.device)
    log_counts[-1] = math.log(seqlen - (n_tiles - 1) * TILE)
    return Pooled(*means, log_counts, covariance.unflatten(0, (batch, heads)))


def raised(threshold: float, variance: Tensor, lost_min: float = LOST_MIN, raised_max: float = RAISED_MAX) -> Tensor:
    """The threshold (natural log) of rows with this score variance, of its shape; NaN where that is NaN."""
    lost = (1 - (-variance).exp()).clamp(lost_min, 1.0)
    return (threshold - lost.log()).clamp(max=max(threshold, math.log(raised_max)))
