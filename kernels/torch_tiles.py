"""Attention of neighbouring query tiles in torch operators, as functions that TorchScript can run.

Scripted, they hold Python's lock only while they are called. Threads that call small operators from Python wait for
that lock at every operator (measured with two threads at 8192 tokens: 1.36 times the time). Where there is no
TorchScript the same functions run as they are.
"""
# No postponed annotations: TorchScript reads them.

import logging
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import TILE
from .pooled import raised

CHUNK = 8
"""Key tiles taken at once, up to 1.5 times as many: their scores, 512 KB, stay in a core's cache."""

_LOWEST = -64.0
"""Lowest exponent of a weight relative to the row's maximum (1.6e-28, nothing in float32): weights that underflow make
`exp` and the product with v 10 to 100 times slower on a CPU."""

_NOTHING = torch.finfo(torch.float32).min
"""Largest score of a row that has met none but -inf: finite, so that it can be subtracted."""


def scratch_elements(head_dim: int) -> int:
    """Elements of a worker's scratch memory: the scores, and the keys or values, of a chunk."""
    return (CHUNK + CHUNK // 2) * TILE * (TILE + head_dim)


class Part(NamedTuple):
    """Neighbouring query tiles of one head.

    Attributes:
        q, out: [rows, D]. lse: [rows] or None.
        k, v: float32 [KT, 128, D], contiguous, the last tile filled up with zeros. n_keys: without these.
        active: bool [tiles, KT] on the CPU, tiles to compute.
        keep: the same, tiles found to stay; None unless recording.
        positions: int64 [tiles, KT] on the CPU, when the key tiles are visited.
        pooled: keys [KT, D], values [KT, D], log_counts [KT] and covariance [D, 2 D], see `Pooled`; or nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    n_keys: int
    out: Tensor
    lse: Tensor | None
    active: Tensor
    keep: Tensor | None
    positions: Tensor
    pooled: list[Tensor]


def attend_part(part: Part, scratch: Tensor, threshold: float, sm_scale: float, mass: bool,
                tile: int = TILE, nothing: float = _NOTHING) -> None:
    """Write `out`, `lse` and `keep` of a part. Everything in float32.

    Args:
        scratch: float32, `scratch_elements`.
        threshold: natural log.
    """
    queries = part.q.float() * sm_scale
    n_rows, n_tiles = queries.size(0), part.active.size(1)
    row_max = torch.full_like(queries[:, :1], nothing)
    total, acc = torch.zeros_like(row_max), torch.zeros_like(queries)
    keep, lse = part.keep, part.lse
    visited = torch.full([0 if keep is None else n_rows, n_tiles], -math.inf, device=queries.device)
    for i in range(part.active.size(0)):
        first, last = i * tile, min(n_rows, (i + 1) * tile)
        index = part.active[i].nonzero().squeeze(1)
        if index.size(0):
            strengths = _attend_tile(queries[first:last], part, index, row_max[first:last], total[first:last],
                                     acc[first:last], scratch, mass and keep is not None)
            if keep is not None:
                at = part.positions[i].index_select(0, index).to(queries.device)
                visited[first:last].index_copy_(1, at, strengths)
    thresholds = torch.full_like(row_max, threshold)
    if len(part.pooled):
        thresholds = _add_pooled(queries, part.pooled, part.active, row_max, total, acc, threshold, tile)
    if keep is not None:
        stays = _stays(visited.cpu(), thresholds.cpu(), mass, tile)
        keep.copy_(stays.gather(1, part.positions).logical_and_(part.active))
    met_nothing = row_max == nothing
    if lse is not None:
        lse.copy_((row_max + total.log()).masked_fill_(met_nothing, -math.inf).squeeze(1))
    part.out.copy_(acc.div_(total.masked_fill_(met_nothing, math.nan)))
    if not len(part.pooled):
        empty: list[int] = (~part.active.any(1)).nonzero().flatten().tolist()
        for i in empty:
            part.out[i * tile:(i + 1) * tile].zero_()


def _attend_tile(queries: Tensor, part: Part, index: Tensor, row_max: Tensor, total: Tensor, acc: Tensor,
                 scratch: Tensor, mass: bool, tile: int = TILE, chunk: int = CHUNK) -> Tensor:
    """Attention of one query tile over the key tiles in `index` (ascending, on the CPU). Updates row_max, total, acc.

    Returns:
        Each tile's strength in each row, [rows, tiles]: its largest score, or for the mass test the log-sum-exp of its
        scores.
    """
    n_rows, n_columns, n_listed = queries.size(0), part.k.size(0) * tile, index.size(0)
    n_chunks = max(1, (n_listed + chunk // 2) // chunk)
    strengths: list[Tensor] = []
    for i in range(n_chunks):
        begin, end = i * n_listed // n_chunks, (i + 1) * n_listed // n_chunks
        chosen, first, last = index[begin:end], int(index[begin]), int(index[end - 1])
        n_tiles, columns = end - begin, (end - begin) * tile
        scores = scratch[:n_rows * columns].view(n_rows, columns)
        gathered = scratch[scratch.size(0) - columns * queries.size(1):].view(n_tiles, tile, -1)
        torch.mm(queries, _take(part.k, chosen, first, last, gathered).t(), out=scores)
        if last == n_columns // tile - 1 and part.n_keys < n_columns:
            scores[:, part.n_keys - n_columns:].fill_(-math.inf)
        by_tile = scores.view(n_rows, n_tiles, tile)
        largest = by_tile.amax(2)
        _rescale(row_max, total, acc, largest.amax(1, keepdim=True), i == 0)
        total.add_(_weigh(scores, row_max))
        acc.addmm_(scores, _take(part.v, chosen, first, last, gathered))
        if mass:  # `by_tile` holds the weights now
            largest = by_tile.sum(2).log_().add_(row_max).masked_fill_(largest == -math.inf, -math.inf)
        strengths.append(largest)
    return torch.cat(strengths, 1)


def _take(x: Tensor, chosen: Tensor, first: int, last: int, gathered: Tensor) -> Tensor:
    """Keys or values [tiles * 128, D] of the chosen tiles, from `first` to `last`: a view where they are neighbours,
    else copies in `gathered`: one product of copies is faster than several short ones."""
    if last - first < chosen.size(0):
        return x[first:last + 1].flatten(0, 1)
    return torch.index_select(x, 0, chosen.to(x.device), out=gathered).flatten(0, 1)


def _rescale(row_max: Tensor, total: Tensor, acc: Tensor, largest: Tensor, first: bool) -> None:
    """Raise row_max to `largest`, [rows, 1]; first: total and acc are 0."""
    new_max = torch.maximum(row_max, largest)
    if not first:
        factor = row_max.sub_(new_max).exp_()
        total.mul_(factor)
        acc.mul_(factor)
    row_max.copy_(new_max)


def _weigh(scores: Tensor, row_max: Tensor, lowest: float = _LOWEST) -> Tensor:
    """Turns scores into weights, in place, and gives their sums [rows, 1]."""
    # exp, not exp2: on a CPU it is faster in torch.
    return scores.sub_(row_max).clamp_min_(lowest).exp_().sum(1, keepdim=True)


def _add_pooled(queries: Tensor, pooled: list[Tensor], active: Tensor, row_max: Tensor, total: Tensor, acc: Tensor,
                threshold: float, tile: int) -> Tensor:
    """Take in the pooled keys and values of skipped tiles; gives each row's threshold [rows, 1] (natural log)."""
    keys, values, log_counts, covariance = pooled[0], pooled[1], pooled[2], pooled[3]
    by_spread, shift = torch.mm(queries, covariance).chunk(2, 1)
    variance = (by_spread * queries).sum(1, keepdim=True).clamp_min_(0)
    if not bool(active.all()):
        skipped = log_counts.masked_fill(active.to(queries.device), -math.inf).repeat_interleave(tile, 0)
        scores = torch.addmm(skipped[:queries.size(0)], queries, keys.t())
        _rescale(row_max, total, acc, scores.amax(1, keepdim=True), False)
        added = _weigh(scores, row_max)
        total.add_(added)
        acc.addmm_(scores, values).addcmul_(shift, (variance * -0.5).exp_().mul_(added))
    return raised(threshold, variance)


def _stays(visited: Tensor, thresholds: Tensor, mass: bool, tile: int) -> Tensor:
    """Which tiles at least one row wants to stay, bool [query tiles, tiles].

    Args:
        visited: strengths [rows, tiles] of the tiles in visit order, -inf where not active; on the CPU, used up.
        thresholds: natural log, [rows, 1].
    """
    # A row that has met NaN or +inf votes to keep from there on, as NaN does.
    visited.nan_to_num_(math.nan, math.nan, -math.inf)
    if mass:
        largest = visited.nan_to_num(-math.inf, math.inf, -math.inf).amax(1, keepdim=True)
        # In float64, for sums far below a later maximum; weights lower still, and 0, would only make `exp` slow.
        above = visited.sub_(largest).clamp_min_(-700.0).double().exp_()
        # The tile itself included. Less what such weights of all tiles can add up to: a row that has met nothing keeps.
        above.sub_(above.cumsum(1).sub_(math.exp(-689.0)).mul_(thresholds.double().exp_()))
    else:
        before = visited.cummax(1)[0][:, :-1]
        visited[:, 1:].sub_(before)
        visited[:, :1].fill_(math.inf)
        above = visited.sub_(thresholds)
    return torch.stack([~(x.amax(0) <= 0) for x in above.split(tile)])  # "not at or below"


@cache
def scripted(device_type: str) -> Callable[..., None]:
    """`attend_part` for a device: scripted on a CPU, as it is elsewhere and where scripting fails."""
    if device_type != "cpu":
        return attend_part
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, without anything else that leaves Python's lock alone
            return torch.jit.script(attend_part)
    except Exception as error:
        logging.getLogger(__name__).debug("no TorchScript: %s", error)
        return attend_part
