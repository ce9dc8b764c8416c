"""A plain simulation of the pack's kernels, with every part removable. It takes q, k, v [B, H, N, D] float32, computes
all scores and leaves times to others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 256
"""Query rows whose scores are held at once: they stay in a core's cache."""


@dataclass(frozen=True)
class Rules:
    """How a simulated call chooses tiles.

    Attributes:
        tile, key_tile: query and key tokens of a tile.
        criterion: "max", "mass", "both" (a row votes to drop a tile when both tests do) or "either".
        second: log2 threshold of the max test in "both" and "either".
        pool_skipped: skipped tiles are represented by their means.
        covariance: and by the covariance of keys and values inside tiles.
        weighted: thresholds are divided by the fraction that pooling loses.
        mass_cap: pooled tiles weigh exp(variance / 2) more, as of scores that are normal, and at most exp(this).
    """

    tile: int = 128
    key_tile: int = 128
    criterion: str = "mass"
    second: float = -4.0
    pool_skipped: bool = True
    covariance: bool = True
    weighted: bool = True
    mass_cap: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """One attention call.

    Attributes:
        out: [B, H, N, D].
        computed: bool [B, H, QT, KT], the tiles that it took part with in full.
        keep: the same for the next call.
    """

    out: Tensor
    computed: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Chunk:
    """Some query tiles of one head. Rows past the end repeat the last row, keys past the end weigh nothing.

    Attributes:
        b, h, tiles: where it stands; `tiles` are query tiles. rows: tokens (without those past the end).
        queries: [R, D] scaled; scores: [R, KT, T], T keys in a tile; weights: exp(scores - top); top: [R, 1].
        mass: [R, KT], sums of weights.
    """

    b: int
    h: int
    tiles: slice
    rows: slice
    queries: Tensor
    scores: Tensor
    weights: Tensor
    top: Tensor
    mass: Tensor

    def per_row(self, by_tile: Tensor) -> Tensor:
        """[query tiles of the chunk, KT] -> [R, KT]."""
        return by_tile.repeat_interleave(len(self.scores) // (self.tiles.stop - self.tiles.start), 0)


def pad_tokens(x: Tensor, tile: int) -> Tensor:
    """Zeros at the end of [..., N, D] up to whole tiles."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % tile))


def chunks(q: Tensor, k: Tensor, tile: int, key_tile: int) -> Iterator[Chunk]:
    """All scores of a call, a few query tiles at a time."""
    batch, heads, seqlen, head_dim = q.shape
    per_chunk = max(1, CHUNK // tile)
    q_tiles = -(-seqlen // tile)
    keys = pad_tokens(k, key_tile)
    for b in range(batch):
        for h in range(heads):
            for first in range(0, q_tiles, per_chunk):
                last = min(first + per_chunk, q_tiles)
                index = torch.arange(first * tile, last * tile, device=q.device).clamp_max(seqlen - 1)
                queries = q[b, h, index] * head_dim ** -0.5
                scores = queries @ keys[b, h].T
                scores[:, seqlen:] = -math.inf
                top = scores.amax(-1, keepdim=True)
                weights = (scores - top).exp_().unflatten(-1, (-1, key_tile))
                yield Chunk(b, h, slice(first, last), slice(first * tile, min(last * tile, seqlen)), queries,
                            scores.unflatten(-1, (-1, key_tile)), weights, top, weights.sum(-1))


@dataclass(frozen=True)
class Means:
    """Mean keys and values [B, H, KT, D], log of tile sizes [KT], covariances [B, H, D, D] inside tiles."""

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    shift: Tensor
    spread: Tensor


def means(k: Tensor, v: Tensor, tile: int) -> Means:
    """Pooled keys and values of all key tiles, by the formulae of docs/quality.md."""
    seqlen = k.shape[2]
    owner = torch.arange(seqlen, device=k.device) // tile
    counts = torch.bincount(owner).to(k.dtype)
    sums = [x.new_zeros(*x.shape[:2], counts.numel(), x.shape[3]).index_add_(2, owner, x) for x in (k, v)]
    keys, values = (x / counts[:, None] for x in sums)
    dk, dv = k - keys[:, :, owner], v - values[:, :, owner]
    return Means(keys, values, counts.log(), dk.mT @ dv / seqlen, dk.mT @ dk / seqlen)


def visit_order(q_tiles: Tensor, key_tiles: int, ragged: bool, backwards: bool, per_query_tile: int = 1) -> Tensor:
    """Key tiles [len(q_tiles), KT] in the order of a recording pass (see `lite_attention`); `per_query_tile` of them
    have the tokens of one query tile."""
    rank = torch.arange(key_tiles, device=q_tiles.device).expand(len(q_tiles), -1).clone()
    if backwards:
        rank = key_tiles - rank
    rank[rank.new_tensor(range(key_tiles)) // per_query_tile == q_tiles[:, None]] = -1
    if ragged:
        rank[:, -1] = key_tiles + 1
    return rank.argsort(stable=True, dim=-1)


def decide(c: Chunk, keep: Tensor, level: float, rules: Rules, ragged: bool, backwards: bool,
           lost: Tensor | None) -> Tensor:
    """Tiles of a chunk that stay, bool [query tiles, KT].

    Args:
        keep: what was computed. level: log2 threshold. lost: [R, 1], the fraction that pooling loses, or None.
    """
    order = visit_order(torch.arange(c.tiles.start, c.tiles.stop, device=keep.device), keep.shape[-1], ragged,
                        backwards, rules.tile // rules.key_tile)
    by_row, here = c.per_row(order), c.per_row(keep)

    def threshold(log2: float) -> Tensor:
        bar = torch.full_like(c.top, log2 * math.log(2))
        return bar if lost is None else (bar - lost.log()).clamp_max(max(log2 * math.log(2), math.log(0.5)))

    def by_mass(log2: float) -> Tensor:
        strength = (c.mass * here).gather(1, by_row)
        return ~(strength.log() - strength.cumsum(-1).log() <= threshold(log2))

    def by_max(log2: float) -> Tensor:
        strength = c.scores.amax(-1).masked_fill(~here, -math.inf).gather(1, by_row)
        reference = strength.cummax(-1).values.roll(1, -1)
        reference[:, 0] = -math.inf
        return ~(strength - reference <= threshold(log2))

    stays = {"mass": lambda: by_mass(level), "max": lambda: by_max(level),
             "both": lambda: by_mass(level) | by_max(rules.second),
             "either": lambda: by_mass(level) & by_max(rules.second)}[rules.criterion]()
    stays = stays.unflatten(0, (-1, rules.tile)).any(1)
    return keep & torch.zeros_like(keep).scatter_(1, order, stays)


def simulate(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, levels: Tensor, rules: Rules,
             backwards: bool = False) -> Outcome:
    """A recording call, every score computed.

    Args:
        keep: bool [B, H, QT, KT] or None = all. levels: [B, H], log2 thresholds; -inf keeps every tile.
    """
    tile, seqlen = rules.key_tile, q.shape[2]
    keep = q.new_ones(*q.shape[:2], -(-seqlen // rules.tile), -(-seqlen // tile), dtype=torch.bool) if keep is None \
        else keep
    kept_next, out = keep.clone(), torch.empty_like(q)
    values = pad_tokens(v, tile)
    stand = means(k, v, tile) if rules.pool_skipped else None
    for c in chunks(q, k, rules.tile, tile):
        mine, lost = keep[c.b, c.h, c.tiles], None
        if stand is not None:
            variance = ((c.queries @ stand.spread[c.b, c.h]) * c.queries).sum(-1, keepdim=True).clamp_min(0)
            if rules.weighted:
                lost = (1 - (-variance).exp()).clamp(2.0 ** -6, 1)
        kept_next[c.b, c.h, c.tiles] = decide(c, mine, levels[c.b, c.h].item(), rules, seqlen % tile != 0, backwards,
                                              lost)
        here = c.per_row(mine)
        weights = c.weights * here.unsqueeze(-1)
        top, total = weights.flatten(1) @ values[c.b, c.h], (c.mass * here).sum(-1, keepdim=True)
        if stand is not None:
            more = (0.5 * variance).clamp_max(rules.mass_cap)
            w = (c.queries @ stand.keys[c.b, c.h].T + stand.log_counts - c.top + more).exp() * ~here
            added = w.sum(-1, keepdim=True)
            top, total = top + w @ stand.values[c.b, c.h], total + added
            if rules.covariance:
                top += (c.queries @ stand.shift[c.b, c.h]) * (added * (-0.5 * variance).exp())
        out[c.b, c.h, c.rows] = (top / total)[:c.rows.stop - c.rows.start]
    return Outcome(out, keep, kept_next)
