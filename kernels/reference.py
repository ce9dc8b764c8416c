"""The rule of `lite_attention` in plain float64 loops: its specification as code, and what both backends are held to.

Nothing here is fast, and nothing is shared with the backends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128


@dataclass
class Reference:
    """out [B, H, N_q, D] and lse [B, H, N_q] in float64; keep and margin [B, H, QT, KT].

    margin: how far (log2) the deciding row was from the other decision; inf for tiles that were not visited.
    """

    out: Tensor
    lse: Tensor
    keep: Tensor
    margin: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, active: Tensor, threshold: float, backwards: bool | list[bool] = False,
              sm_scale: float | None = None, must: Tensor | None = None, mass: bool = False,
              pool_skipped: bool = False) -> Reference:
    """One recording pass.

    Args:
        q, k, v: [B, H, N, D] of any float dtype. What NaN and Inf do follows from float64 arithmetic.
        active: bool [B, H, QT, KT].
        threshold: log2.
        backwards: the visiting direction, of all batch entries or of each.
        must: bool [QT, KT], tiles that stay.
    """
    q, k, v = (x.double() for x in (q, k, v))
    batch, heads, n_q, d = q.shape
    scale = d ** -0.5 if sm_scale is None else sm_scale
    result = Reference(torch.zeros_like(q), torch.full((batch, heads, n_q), -math.inf, dtype=torch.float64),
                       torch.zeros_like(active), torch.full(active.shape, math.inf, dtype=torch.float64))
    for b in range(batch):
        for h in range(heads):
            for query_tile in range(active.shape[2]):
                rows = slice(query_tile * TILE, min(n_q, query_tile * TILE + TILE))
                at = b, h, query_tile
                scores = q[b, h, rows] @ k[b, h].T * scale
                limits = torch.full_like(scores[:, 0], threshold)
                if pool_skipped:
                    scaled = q[b, h, rows] * scale
                    result.out[b, h, rows], result.lse[b, h, rows] = with_pooled(scaled, k[b, h], v[b, h], active[at])
                    limits = raised(threshold, variance(scaled, k[b, h]))
                elif active[at].any():
                    seen = active[at].repeat_interleave(TILE)[:k.shape[2]]
                    result.out[b, h, rows] = torch.softmax(scores[:, seen], -1) @ v[b, h, seen]
                    result.lse[b, h, rows] = torch.logsumexp(scores[:, seen], -1)
                back = backwards if isinstance(backwards, bool) else backwards[b]
                visited = order(active[at].tolist(), query_tile, back, k.shape[2])
                result.keep[at], result.margin[at] = decide(scores, visited, limits, mass, active.shape[3])
    if must is not None:
        result.keep |= must & active
    return result


def order(active: list[bool], query_tile: int, backwards: bool, n_keys: int) -> list[int]:
    """A query tile's active key tiles as they are visited: its own, the others up or down, a partial one last."""
    last = len(active) - 1
    partial = [last] if n_keys % TILE and active[last] else []
    whole = [t for t in range(len(active)) if active[t] and t not in partial]
    own = [query_tile] if query_tile in whole else []
    others = [t for t in whole if t not in own]
    return own + (others[::-1] if backwards else others) + partial


def decide(scores: Tensor, visited: list[int], limits: Tensor, mass: bool, n_tiles: int) -> tuple[Tensor, Tensor]:
    """keep and margin [KT] of one query tile. scores: [rows, N_k], natural units; limits: log2, [rows]."""
    keep, margin = torch.zeros(n_tiles, dtype=torch.bool), torch.full((n_tiles,), math.inf, dtype=torch.float64)
    reference = torch.full_like(limits, -math.inf)  # of the tiles before: their maximum, or the log of their sum
    spoiled = torch.zeros_like(limits, dtype=torch.bool)
    for t in visited:
        tile = scores[:, t * TILE:(t + 1) * TILE]
        top = tile.max(1).values
        spoiled |= top.isnan() | (top == math.inf)
        if mass:
            strength = torch.logsumexp(tile, 1)
            reference = torch.logaddexp(reference, strength)  # the tile itself included
        else:
            strength = top
        # A row of nothing but -inf so far has no maximum to be below.
        above = ((strength - reference) / math.log(2) - limits).nan_to_num(nan=math.inf)
        if not mass:
            reference = torch.maximum(reference, top)
        keep[t] = bool((spoiled | (above > 0)).any())
        margin[t] = math.inf if spoiled.any() else above.max().abs()
    return keep, margin


def with_pooled(q: Tensor, k: Tensor, v: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one query tile with skipped tiles pooled. q: [rows, D], scaled; active: bool [KT]."""
    scores, values, skipped = [], [], []
    for t, on in enumerate(active.tolist()):
        keys, vals = k[t * TILE:(t + 1) * TILE], v[t * TILE:(t + 1) * TILE]
        if on:
            scores.append(q @ keys.T)
            values.append(vals)
        else:
            scores.append(q @ keys.mean(0, keepdim=True).T + math.log(keys.shape[0]))
            values.append(vals.mean(0, keepdim=True))
        skipped += [not on] * values[-1].shape[0]
    scores, values = torch.cat(scores, 1), torch.cat(values)
    weights = torch.softmax(scores, 1)
    shift = (q @ covariance(k, v)) * torch.exp(-variance(q, k) / 2)[:, None]
    pooled_weight = weights[:, torch.tensor(skipped)].sum(1, keepdim=True)
    return weights @ values + pooled_weight * shift, torch.logsumexp(scores, 1)


def covariance(k: Tensor, x: Tensor) -> Tensor:
    """[D, D]: mean over all keys of (k - mean of k's tile)(x - mean of x's tile).T. k, x: [N, D]."""
    total = 0
    for start in range(0, k.shape[0], TILE):
        a, b = k[start:start + TILE], x[start:start + TILE]
        total = total + (a - a.mean(0)).T @ (b - b.mean(0))
    return total / k.shape[0]


def variance(q: Tensor, k: Tensor) -> Tensor:
    """Of each row's scores inside tiles. q: [rows, D], scaled."""
    return ((q @ covariance(k, k)) * q).sum(1)


def raised(threshold: float, variance: Tensor) -> Tensor:
    """The threshold (log2) of rows with this variance: divided by the fraction of a tile that pooling loses."""
    lost = (1 - torch.exp(-variance)).clamp(1 / 64, 1)
    return torch.minimum(threshold - torch.log2(lost), torch.tensor(max(threshold, -1.0)))
