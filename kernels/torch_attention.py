"""The torch backend: CPU, MPS and any GPU without Triton. Gathers the active key tiles, computes only those."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .mask import TILE, MustKeep, pack_bits, tiles, unpack_words
from .pooled import Summary, raised, score_variance, summarize
from .workspace import Workspace

_CPU_CHUNK = 32
"""Key tiles taken at once on a CPU: scores and gathered keys stay in its cache and below malloc's mapping threshold,
above which every call pays for fresh pages (measured: 4x at 8192 tokens)."""

_CPU_ROWS = 16 * TILE
"""Query rows whose part in stand-ins is computed at once on a CPU: small operations cost more than they compute."""

_SCORE_BUDGET = 64 * 2**20
"""Elements of the score matrix held at once on an accelerator (256 MB in float32)."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rows: list | None,
                    backwards: list[bool] | None, threshold: float, recording: bool, must_keep: MustKeep | None,
                    sm_scale: float, workspace: Workspace, computed: Tensor | None, mass: bool = False,
                    pool_skipped: bool = False) -> None:
    """`lite_attention` after its checks; writes `out` and `lse`, and the masks of `rows` while recording.

    q, k, v, out: [B, H, N, D] views; scores and softmax in float32 whatever the input dtype. `workspace` is not
    used: tensors here live for one query tile.
    """
    batch, heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    q_tiles, k_tiles = tiles(seqlen_q), tiles(seqlen_k)
    if rows is None:
        active = np.ones((batch, heads, q_tiles, k_tiles), dtype=bool)
        backwards = [False] * batch
    else:
        words = torch.stack([m.words[r] for m, r in rows])
        active = unpack_words(words.cpu(), k_tiles).numpy()
    ragged = seqlen_k % TILE != 0
    lists = [
        _TileList(b, h, qt, *_split_tail(active[b, h, qt], ragged), backwards[b])
        for b in range(batch) for h in range(heads) for qt in range(q_tiles)
    ]
    keep = torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.bool, device=q.device) if recording else None
    # Nothing to stand in for, and no decision to take: a summary would be for nothing.
    summary = summarize(k, v) if pool_skipped and (recording or not active.all()) else None
    stand_ins = None if summary is None else _StandIns(summary, q, sm_scale, threshold * math.log(2))
    for group in _groups(lists, seqlen_q, q.device):
        _attend(q, k, v, out, lse, group, threshold * math.log(2), sm_scale, keep, mass, stand_ins)
    if computed is not None:
        computed.view(-1)[:1].add_(int(active.sum()))
    if recording:
        if must_keep is not None:
            keep |= must_keep.tile_mask(seqlen_q, seqlen_k).to(q.device)
        kept = pack_bits(keep)
        for b, (m, r) in enumerate(rows):
            m.words[r] &= kept[b]


@dataclass(frozen=True)
class _TileList:
    """Active key tiles of one query tile. `body`: whole tiles, ascending; `tail`: the partial last one is active."""

    b: int
    h: int
    qt: int
    body: np.ndarray
    tail: bool
    backwards: bool

    @property
    def empty(self) -> bool:
        return not self.tail and not self.body.size

    def skipped(self, key_tiles: int) -> np.ndarray:
        """bool [KT], True where a tile is not active."""
        skipped = np.ones(key_tiles, dtype=bool)
        skipped[self.body] = False
        if self.tail:
            skipped[-1] = False
        return skipped

    def visit_positions(self) -> np.ndarray:
        """Positions in `body`, in visit order: the own tile first, then ascending or descending."""
        own = self.body == self.qt
        others = np.flatnonzero(~own)
        return np.concatenate([np.flatnonzero(own), others[::-1] if self.backwards else others])


def _split_tail(active: np.ndarray, ragged: bool) -> tuple[np.ndarray, bool]:
    whole = active[:-1] if ragged else active
    return np.flatnonzero(whole), bool(ragged and active[-1])


def _groups(lists: list[_TileList], seqlen_q: int, device: torch.device) -> list[list[_TileList]]:
    """Query tiles to compute together: one by one on a CPU (its cache), by similar cost on an accelerator."""
    if device.type == "cpu":
        return [[x] for x in lists]
    partial = tiles(seqlen_q) - 1 if seqlen_q % TILE else -1

    def kind(x: _TileList) -> tuple[bool, bool, bool]:
        return x.qt == partial, x.empty, x.tail

    groups: list[list[_TileList]] = []
    for x in sorted(lists, key=lambda x: (kind(x), -x.body.size)):
        group = groups[-1] if groups else None
        if (group and kind(group[0]) == kind(x)
                and (len(group) + 1) * (group[0].body.size + 1) * TILE * TILE <= _SCORE_BUDGET):
            group.append(x)
        else:
            groups.append([x])
    return groups


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, group: list[_TileList],
            threshold: float, sm_scale: float, keep: Tensor | None, mass: bool, stand_ins: _StandIns | None) -> None:
    """Attention of a group alike in tail and query rows, padded to its longest body. threshold: natural log."""
    rows = min(TILE, q.shape[2] - group[0].qt * TILE)

    def span(x: _TileList) -> slice:
        return slice(x.qt * TILE, x.qt * TILE + rows)

    if group[0].empty and stand_ins is None:
        for x in group:
            out[x.b, x.h, span(x)] = 0
            if lse is not None:
                lse[x.b, x.h, span(x)] = -math.inf
        return
    body_len = max(x.body.size for x in group)
    queries = _stack([q[x.b, x.h, span(x)] for x in group]).float() * sm_scale
    softmax = _OnlineSoftmax(queries, v.shape[-1], mass and keep is not None)
    strength = []
    step = _CPU_CHUNK if q.device.type == "cpu" else body_len
    for first in range(0, body_len, max(step, 1)):
        width = min(step, body_len - first)
        keys, values = (_stack([_gather(t[x.b, x.h], x.body[first:first + width], width) for x in group]).float()
                        for t in (k, v))
        strength.append(softmax.add(keys, values, [x.body.size - first for x in group]))
    if group[0].tail:
        full = k.shape[2] // TILE * TILE
        keys, values = (_stack([t[x.b, x.h, full:] for x in group]).float() for t in (k, v))
        strength.append(softmax.add(keys, values, None))
    if stand_ins is None:
        thresholds = torch.full_like(queries[..., :1], threshold)
    else:
        parts = stand_ins.of(group, queries)
        thresholds = parts.thresholds
        skipped = torch.from_numpy(np.stack([x.skipped(parts.scores.shape[-1]) for x in group]))
        if skipped.any():
            values = _stack([stand_ins.summary.values[x.b, x.h] for x in group])
            softmax.add_stand_ins(parts, values, skipped.to(queries.device))
    if keep is not None and strength:
        _vote(torch.cat(strength, -1), body_len, thresholds, group, keep, mass)
    result, row_lse = softmax.finish()
    for i, x in enumerate(group):
        out[x.b, x.h, span(x)] = result[i].to(out.dtype)
        if lse is not None:
            lse[x.b, x.h, span(x)] = row_lse[i]


@dataclass(frozen=True)
class _Parts:
    """What stand-ins need of query rows, whichever tiles are skipped: thresholds [G, rows, 1] (natural log), scores of
    all stand-ins [G, rows, KT], the covariances' shift of the value per weight of stand-ins [G, rows, D]."""

    thresholds: Tensor
    scores: Tensor
    shifted: Tensor

    @classmethod
    def make(cls, queries: Tensor, keys: Tensor, shift: Tensor, spread: Tensor, log_counts: Tensor,
             threshold: float) -> _Parts:
        """queries: [G, rows, D], scaled; keys: [G, KT, D]; shift, spread: [G, D, D]."""
        variance = score_variance(queries, spread)
        return cls(raised(threshold, variance), torch.baddbmm(log_counts, queries, keys.mT),
                   torch.bmm(queries, shift).mul_((variance * -0.5).exp_()))


class _StandIns:
    """`_Parts` of query tiles: of each group on an accelerator, of many rows of a head at once on a CPU."""

    def __init__(self, summary: Summary, q: Tensor, sm_scale: float, threshold: float):
        self.summary, self._q, self._sm_scale, self._threshold = summary, q, sm_scale, threshold
        self._at: tuple[int, int, int] | None = None
        self._rows: _Parts | None = None

    def of(self, group: list[_TileList], queries: Tensor) -> _Parts:
        """queries: the group's, [G, rows, D], scaled."""
        if queries.device.type != "cpu":
            return self._make(queries, [(x.b, x.h) for x in group])
        x, = group
        block, first = divmod(x.qt * TILE, _CPU_ROWS)
        if self._at != (x.b, x.h, block):
            rows = self._q[x.b, x.h, block * _CPU_ROWS:(block + 1) * _CPU_ROWS]
            self._rows = self._make(rows.unsqueeze(0).float() * self._sm_scale, [(x.b, x.h)])
            self._at = x.b, x.h, block
        here, all_rows = slice(first, first + queries.shape[1]), self._rows
        return _Parts(all_rows.thresholds[:, here], all_rows.scores[:, here], all_rows.shifted[:, here])

    def _make(self, queries: Tensor, members: list[tuple[int, int]]) -> _Parts:
        keys, shift, spread = (_stack([x[b, h] for b, h in members])
                               for x in (self.summary.keys, self.summary.shift, self.summary.spread))
        return _Parts.make(queries, keys, shift, spread, self.summary.log_counts, self._threshold)


class _OnlineSoftmax:
    """Softmax attention of `queries` (float32 [G, rows, D], scaled) over keys that arrive in parts.

    mass: a tile's strength is its log-sum-exp, and not its maximum.
    """

    def __init__(self, queries: Tensor, head_dim: int, mass: bool = False):
        self.mass = mass
        self.queries = queries
        shape = queries.shape[:2]
        self.row_max = queries.new_full((*shape, 1), -math.inf)
        self.total = queries.new_zeros(*shape, 1)
        self.acc = queries.new_zeros(*shape, head_dim)

    def add(self, keys: Tensor, values: Tensor, whole_tiles: list[int] | None) -> Tensor:
        """Take in keys and values [G, n, D] and give each tile's strength in each row [G, rows, tiles].

        `whole_tiles`: how many of the 128-key tiles are real in each member of the group; None: one partial tile.
        """
        scores = torch.bmm(self.queries, keys.transpose(1, 2))
        if whole_tiles is None:
            tile_max = scores.amax(-1, keepdim=True)
        else:
            by_tile = scores.unflatten(-1, (-1, TILE))
            for i, real in enumerate(whole_tiles):
                if real < by_tile.shape[2]:
                    by_tile[i, :, max(real, 0):] = -math.inf
                    values[i, max(real, 0) * TILE:] = 0  # NaN and Inf of a tile that only pads: 0 * NaN is NaN
            tile_max = by_tile.amax(-1)
        row_max = torch.maximum(self.row_max, tile_max.amax(-1, keepdim=True))
        # A row of nothing but -inf so far has no maximum to subtract.
        finite_max = torch.where(row_max == -math.inf, 0.0, row_max)
        rescale = (self.row_max - finite_max).exp_()
        # exp, not exp2: on a CPU it is several times faster in torch.
        weights = scores.sub_(finite_max).exp_()
        by_tile = weights
        if self.mass:
            by_tile = weights.unflatten(-1, (1, -1) if whole_tiles is None else (-1, TILE)).sum(-1)
        self.total.mul_(rescale).add_(by_tile.sum(-1, keepdim=True))
        self.acc.mul_(rescale).baddbmm_(weights, values)
        self.row_max = row_max
        return by_tile.log_().add_(finite_max) if self.mass else tile_max

    def add_stand_ins(self, parts: _Parts, values: Tensor, skipped: Tensor) -> None:
        """Take in the stand-ins of skipped tiles. values: [G, KT, D]; skipped: bool [G, KT]."""
        scores = parts.scores.masked_fill(~skipped.unsqueeze(1), -math.inf)
        row_max = torch.maximum(self.row_max, scores.amax(-1, keepdim=True))
        finite_max = torch.where(row_max == -math.inf, 0.0, row_max)
        rescale = (self.row_max - finite_max).exp_()
        weights = scores.sub_(finite_max).exp_()
        added = weights.sum(-1, keepdim=True)
        self.total.mul_(rescale).add_(added)
        self.acc.mul_(rescale).baddbmm_(weights, values).addcmul_(parts.shifted, added)
        self.row_max = row_max

    def finish(self) -> tuple[Tensor, Tensor]:
        """Output [G, rows, D] and log-sum-exp [G, rows], natural log."""
        return self.acc.div_(self.total), (self.row_max + self.total.log()).squeeze(-1)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _gather(x: Tensor, body: np.ndarray, width: int) -> Tensor:
    """Keys or values [width * 128, D] of the tiles in `body` (ascending), padded with tile 0; a view where possible."""
    if body.size == width == body[-1] - body[0] + 1:
        return x[body[0] * TILE:(body[-1] + 1) * TILE]
    full = x.shape[0] // TILE
    padded = body if body.size == width else np.pad(body, (0, width - body.size))
    index = torch.from_numpy(padded).to(x.device)
    return x[:full * TILE].unflatten(0, (full, TILE)).index_select(0, index).flatten(0, 1)


def _vote(strength: Tensor, body_len: int, thresholds: Tensor, group: list[_TileList], keep: Tensor,
          mass: bool) -> None:
    """Write the keep decisions of a group. strength: [G, rows, tiles], maximum or log-sum-exp of the scaled scores,
    thresholds: natural log, [G, rows, 1]."""
    for i, x in enumerate(group):
        positions = x.visit_positions()
        columns = x.body[positions]
        if x.tail:
            positions, columns = np.append(positions, body_len), np.append(columns, keep.shape[-1] - 1)
        in_order = strength[i].index_select(-1, torch.from_numpy(positions).to(strength.device))
        if mass:
            reference = in_order.logcumsumexp(-1)  # the tile itself included
        else:
            running = in_order.cummax(-1).values
            reference = torch.cat([torch.full_like(running[:, :1], -math.inf), running[:, :-1]], -1)
        # "Not at or below", and also every row that has met +inf: NaN and Inf vote to keep.
        stays = (~(in_order - reference <= thresholds[i]) | (reference == math.inf)).any(0)
        keep[x.b, x.h, x.qt, torch.from_numpy(columns).to(keep.device)] = stays
