"""What the quality lab puts in the place of attention: the pack's kernels, a plain simulation of them for any tile
size and with every part removable, an oracle, and Sol-Attn.

Everything here takes q, k, v [B, H, N, D] float32 and leaves times to others: the simulation computes all scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .sol import sol_attention, sol_routes

CHUNK = 256
"""Query rows whose scores are held at once: they stay in a core's cache."""


@dataclass(frozen=True)
class Setting:
    """One point of one curve.

    Attributes:
        curve: the method's name, as in tables and plots.
        level: what moves along the curve: log2 threshold (oracle: of a tile's mean share), or Sol-Attn's tau.
        kind: "kernel" (`lite_attention`), "simulation", "oracle" or "sol".
        tile: tokens per tile side.
        criterion: "max" or "mass"; of an oracle "mass" or "residual" (see `chosen_by_oracle`).
        pool_skipped: skipped tiles are represented by their means.
        covariance: and by the covariance of keys and values inside tiles. Simulation only.
        weighted: thresholds are divided by the fraction that pooling loses. Simulation only.
        refresh: every how many steps a query tile is judged anew; 0 = never. Simulation only.
        warmup: steps at the start that compute everything; the last of them records.
        restart: the step at which all masks are forgotten, as by a second sampler on its own; 0 = never.
        cubes: tokens are grouped in cubes of (frames, rows, columns) inside the call, or None: raster order.
        everywhere: runs on every case and not on the first alone.
    """

    curve: str
    level: float
    kind: str = "simulation"
    tile: int = 64
    criterion: str = "mass"
    pool_skipped: bool = True
    covariance: bool = True
    weighted: bool = True
    refresh: int = 0
    warmup: int = 1
    restart: int = 0
    cubes: tuple[int, int, int] | None = None
    everywhere: bool = False


@dataclass(frozen=True)
class Outcome:
    """One attention call.

    Attributes:
        out: [B, H, N, D], the method's result.
        skipped: share of tiles that were not computed.
        keep: bool [B, H, QT, KT] for the next call, or None.
        dense: exact attention; dropped: [B, H, N], exact softmax mass of each row's skipped tiles. None: not measured.
    """

    out: Tensor
    skipped: float
    keep: Tensor | None = None
    dense: Tensor | None = None
    dropped: Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """Some query tiles of one head. Rows past the end repeat the last row, keys past the end weigh nothing.

    Attributes:
        b, h, tiles: where it stands; `tiles` are query tiles. rows: tokens (without those past the end).
        queries: [R, D] scaled; scores: [R, KT, T]; weights: exp(scores - top); top: [R, 1].
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
        return by_tile.repeat_interleave(self.scores.shape[-1], 0)


def pad_tokens(x: Tensor, tile: int) -> Tensor:
    """Zeros at the end of [..., N, D] up to whole tiles."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % tile))


def chunks(q: Tensor, k: Tensor, tile: int) -> Iterator[Chunk]:
    """All scores of a call, a few query tiles at a time."""
    batch, heads, seqlen, head_dim = q.shape
    per_chunk = max(1, CHUNK // tile)
    q_tiles = -(-seqlen // tile)
    keys = pad_tokens(k, tile)
    for b in range(batch):
        for h in range(heads):
            for first in range(0, q_tiles, per_chunk):
                last = min(first + per_chunk, q_tiles)
                index = torch.arange(first * tile, last * tile, device=q.device).clamp_max(seqlen - 1)
                queries = q[b, h, index] * head_dim ** -0.5
                scores = queries @ keys[b, h].T
                scores[:, seqlen:] = -math.inf
                top = scores.amax(-1, keepdim=True)
                weights = (scores - top).exp_().unflatten(-1, (-1, tile))
                yield Chunk(b, h, slice(first, last), slice(first * tile, min(last * tile, seqlen)), queries,
                            scores.unflatten(-1, (-1, tile)), weights, top, weights.sum(-1))


def measure(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Exact attention [B, H, N, D], and the exact mass [B, H, N] of the tiles that are not in `keep`
    (bool [B, H, QT, KT])."""
    dense, dropped = torch.empty_like(q), q.new_empty(q.shape[:3])
    values = pad_tokens(v, tile)
    for c in chunks(q, k, tile):
        _write_exact(c, values, keep, dense, dropped)
    return dense, dropped


def _write_exact(c: Chunk, values: Tensor, keep: Tensor, dense: Tensor, dropped: Tensor) -> None:
    real, total = c.rows.stop - c.rows.start, c.mass.sum(-1, keepdim=True)
    dense[c.b, c.h, c.rows] = ((c.weights.flatten(1) @ values[c.b, c.h]) / total)[:real]
    away = c.per_row(~keep[c.b, c.h, c.tiles])
    dropped[c.b, c.h, c.rows] = ((c.mass * away).sum(-1) / total.squeeze(-1))[:real]


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


def visit_order(q_tiles: Tensor, key_tiles: int, ragged: bool, backwards: bool) -> Tensor:
    """Key tiles [len(q_tiles), KT] in the order of a recording pass (see `lite_attention`)."""
    rank = torch.arange(key_tiles, device=q_tiles.device).expand(len(q_tiles), -1).clone()
    if backwards:
        rank = key_tiles - rank
    rank[rank.new_tensor(range(key_tiles)) == q_tiles[:, None]] = -1
    if ragged:
        rank[:, -1] = key_tiles + 1
    return rank.argsort(-1)


def decide(c: Chunk, keep: Tensor, setting: Setting, ragged: bool, backwards: bool, lost: Tensor | None) -> Tensor:
    """Tiles of a chunk that stay, bool [query tiles, KT]. keep: what was computed; lost: [R, 1] or None."""
    threshold = torch.full_like(c.top, setting.level * math.log(2))
    if lost is not None:
        threshold = (threshold - lost.log()).clamp_max(max(setting.level * math.log(2), math.log(0.5)))
    order = visit_order(torch.arange(c.tiles.start, c.tiles.stop, device=keep.device), keep.shape[-1], ragged,
                        backwards)
    by_row, here = c.per_row(order), c.per_row(keep)
    if setting.criterion == "mass":
        strength = (c.mass * here).gather(1, by_row)
        strength, reference = strength.log(), strength.cumsum(-1).log()
    else:
        strength = c.scores.amax(-1).masked_fill(~here, -math.inf).gather(1, by_row)
        reference = strength.cummax(-1).values.roll(1, -1)
        reference[:, 0] = -math.inf
    stays = (~(strength - reference <= threshold)).unflatten(0, (-1, c.scores.shape[-1])).any(1)
    return keep & torch.zeros_like(keep).scatter_(1, order, stays)


def chosen_by_oracle(c: Chunk, values: Tensor, stand: Means | None, setting: Setting) -> Tensor:
    """Tiles of a chunk that an oracle computes, bool [query tiles, KT]; the own tile always.

    By "mass": the mean over rows of a tile's exact share of the softmax is above 2^level. By "residual": the root mean
    square over rows of |what the tile adds to the result - what its mean key and value add|, over that of |result|, is.
    """
    total = c.mass.sum(-1, keepdim=True)
    by_tile = (0, (-1, setting.tile))
    if setting.criterion == "mass":
        weight = (c.mass / total).unflatten(*by_tile).mean(1)
    else:
        tiled = values[c.b, c.h].unflatten(0, (-1, setting.tile))
        exact = torch.einsum("rkt,ktd->rkd", c.weights, tiled)
        pooled = (c.queries @ stand.keys[c.b, c.h].T + stand.log_counts - c.top).exp()
        missed = (exact - pooled.unsqueeze(-1) * stand.values[c.b, c.h]).square().sum(-1) / total.square()
        whole = (exact.sum(1) / total).square().sum(-1, keepdim=True)
        weight = (missed.unflatten(*by_tile).mean(1) / whole.unflatten(*by_tile).mean(1)).sqrt()
    own = torch.eye(weight.shape[1], dtype=torch.bool, device=weight.device)[c.tiles]
    return (weight > 2.0 ** setting.level) | own


def simulate(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, setting: Setting, backwards: bool = False,
             measured: bool = True) -> Outcome:
    """A recording call, every score computed. keep: bool [B, H, QT, KT] or None = all.

    An oracle chooses its tiles first and keeps nothing in mind.
    """
    tile, seqlen = setting.tile, q.shape[2]
    key_tiles = -(-seqlen // tile)
    oracle = setting.kind == "oracle"
    keep = q.new_ones(*q.shape[:2], key_tiles, key_tiles, dtype=torch.bool) if keep is None else keep.clone()
    kept_next = keep.clone()
    out, dense, dropped = torch.empty_like(q), torch.empty_like(q), q.new_empty(q.shape[:3])
    values = pad_tokens(v, tile)
    stand = means(k, v, tile) if setting.pool_skipped else None
    for c in chunks(q, k, tile):
        total = c.mass.sum(-1, keepdim=True)
        mine = keep[c.b, c.h, c.tiles]
        if oracle:
            mine.copy_(chosen_by_oracle(c, values, stand, setting))
        if measured:
            _write_exact(c, values, keep, dense, dropped)
        lost = None
        if stand is not None:
            variance = ((c.queries @ stand.spread[c.b, c.h]) * c.queries).sum(-1, keepdim=True).clamp_min(0)
            if setting.weighted:
                lost = (1 - (-variance).exp()).clamp(2.0 ** -6, 1)
        if not oracle:
            kept_next[c.b, c.h, c.tiles] = decide(c, mine, setting, seqlen % tile != 0, backwards, lost)
        here = c.per_row(mine)
        weights = c.weights * here.unsqueeze(-1)
        top, total = weights.flatten(1) @ values[c.b, c.h], (c.mass * here).sum(-1, keepdim=True)
        if stand is not None:
            w = (c.queries @ stand.keys[c.b, c.h].T + stand.log_counts - c.top).exp() * ~here
            added = w.sum(-1, keepdim=True)
            top, total = top + w @ stand.values[c.b, c.h], total + added
            if setting.covariance:
                top += (c.queries @ stand.shift[c.b, c.h]) * (added * (-0.5 * variance).exp())
        out[c.b, c.h, c.rows] = (top / total)[:c.rows.stop - c.rows.start]
    exact = (dense, dropped) if measured else (None, None)
    return Outcome(out, 1 - keep.float().mean().item(), keep if oracle else kept_next, *exact)


def cube_order(grid: tuple[int, int, int], cube: tuple[int, int, int]) -> Tensor:
    """Raster numbers of all tokens in an order that finishes one cube before the next."""
    number = torch.arange(math.prod(grid)).view(grid)
    (t, h, w), (a, b, c) = grid, cube
    return torch.cat([number[i:i + a, j:j + b, m:m + c].flatten()
                      for i in range(0, t, a) for j in range(0, h, b) for m in range(0, w, c)])


class Method:
    """One setting over one run: attention calls by layer and step. The first step computes everything, whatever the
    method."""

    def __init__(self, setting: Setting, grid: tuple[int, int, int]):
        self.setting = setting
        self.order = cube_order(grid, setting.cubes) if setting.cubes else None
        self.state: dict[int, object] = {}
        self.sol = sol_attention()[0] if setting.kind == "sol" else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int, measured: bool = True) -> Outcome:
        """q, k, v [B, H, N, D] in raster order; so is what comes back."""
        if step < self.setting.warmup - 1:
            return self._dense(q, k, v)
        if self.setting.restart and step == self.setting.restart:
            self.state.pop(layer, None)
        call = getattr(self, f"_{self.setting.kind}")
        if self.order is None:
            return call(q, k, v, layer, step, measured)
        q, k, v = (x[:, :, self.order].contiguous() for x in (q, k, v))
        got, back = call(q, k, v, layer, step, measured), self.order.argsort()
        exact = (x[:, :, back] for x in (got.dense, got.dropped)) if measured else ()
        return Outcome(got.out[:, :, back], got.skipped, None, *exact)

    def _simulation(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int, measured: bool) -> Outcome:
        keep = self.state.get(layer)
        if keep is not None and self.setting.refresh:
            keep[:, :, step % self.setting.refresh::self.setting.refresh] = True
        got = simulate(q, k, v, keep, self.setting, step % 2 == 1, measured)
        self.state[layer] = got.keep
        return got

    def _oracle(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int, measured: bool) -> Outcome:
        return self._dense(q, k, v) if step == 0 else simulate(q, k, v, None, self.setting, measured=measured)

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int, measured: bool) -> Outcome:
        from liteattention.kernels import SkipMask, lite_attention

        setting = self.setting
        if layer not in self.state:
            self.state[layer] = SkipMask.full(*q.shape[:3], device=q.device)
        mask = self.state[layer]
        keep = mask.to_bool()
        out = lite_attention(q, k, v, mask, threshold=setting.level, criterion=setting.criterion,
                             pool_skipped=setting.pool_skipped, backend="triton" if q.is_cuda else "torch")
        return self._outcome(q, k, v, out, keep, measured)

    def _sol(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int, measured: bool) -> Outcome:
        if step == 0:
            return self._dense(q, k, v)
        out = self.sol(*(x.transpose(1, 2) for x in (q, k, v)), tau=self.setting.level).transpose(1, 2)
        return self._outcome(q, k, v, out, sol_routes(q, k, self.setting.level), measured)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Outcome:
        dense = F.scaled_dot_product_attention(q, k, v)
        return Outcome(dense, 0.0, None, dense, q.new_zeros(q.shape[:3]))

    def _outcome(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, keep: Tensor, measured: bool) -> Outcome:
        exact = measure(q, k, v, keep, self.setting.tile) if measured else (None, None)
        return Outcome(out, 1 - keep.float().mean().item(), keep, *exact)
