"""What stands in for the tiles that are skipped: a few numbers per tile and per head, from k and v alone.

A skipped tile of n keys enters a row's softmax as one key, the mean of its keys with n times the weight, and as one
value, the mean of its values. What that misses is mostly that the heavier keys of a tile have other values than the
lighter ones. To first order in the score's variation inside a tile this shifts the value by sm_scale * q·C, where C is
the covariance of keys and values inside tiles; one C for a whole head does. The first order overshoots where scores
vary much inside a tile, so the shift is damped by exp(-s / 2), s = sm_scale^2 * q·S·q, with S the covariance of keys
inside tiles: s is the variance of the row's scores inside a tile. The damping is an empirical choice (docs/quality.md).

The same s tells how much of a tile's attention is at stake when the stand-in takes its place: next to nothing where
scores hardly vary, all of it where they do. `stake` is that share; thresholds of skip tests are divided by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask import TILE, tiles

STAKE_MIN = 2.0 ** -6
"""The least share of a tile's attention that is taken to be at stake."""
RAISED_MAX = 0.5
"""A threshold is raised up to this, so that a row's strongest tile stays."""


@dataclass(frozen=True)
class Summary:
    """Stand-ins of the key tiles of each batch row and head, float32.

    Attributes:
        keys, values: [B, H, KT, D], means over each tile.
        log_counts: [KT], natural log of the number of keys in each tile.
        shift: [B, H, D, D], covariance C of keys (rows) and values (columns) inside tiles.
        spread: [B, H, D, D], covariance S of keys inside tiles.
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    shift: Tensor
    spread: Tensor


def summarize(k: Tensor, v: Tensor) -> Summary:
    """The summary of k, v [B, H, N, D] of any dtype, computed in float32."""
    seqlen = k.shape[2]
    n_tiles = tiles(seqlen)
    counts = torch.full((n_tiles, 1), float(TILE), device=k.device)
    counts[-1] = seqlen - (n_tiles - 1) * TILE

    def centred(x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.pad(x.float(), (0, 0, 0, n_tiles * TILE - seqlen)).unflatten(2, (n_tiles, TILE))
        means = x.sum(3) / counts
        return means, (x - means.unsqueeze(3)).flatten(2, 3)[:, :, :seqlen]

    keys, dk = centred(k)
    values, dv = centred(v)
    return Summary(keys, values, counts.squeeze(1).log(), dk.mT @ dv / seqlen, dk.mT @ dk / seqlen)


def score_variance(queries: Tensor, spread: Tensor) -> Tensor:
    """s of each row, [..., rows, 1]. queries: [..., rows, D], scaled by sm_scale; spread: [..., D, D]."""
    return ((queries @ spread) * queries).sum(-1, keepdim=True).clamp_min(0)


def raised(threshold: float, variance: Tensor) -> Tensor:
    """The threshold (natural log) of rows with this score variance, of its shape; NaN where that is NaN."""
    stake = (1 - (-variance).exp()).clamp(STAKE_MIN, 1)
    return (threshold - stake.log()).clamp(max=max(threshold, math.log(RAISED_MAX)))
