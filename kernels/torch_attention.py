"""The torch backend: CPU, MPS and any GPU without Triton. One query tile at a time, active key tiles only."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .mask import TILE, MustKeep, pack_bits, tiles, unpack_words
from .pooled import Pooled, pool_tiles
from .torch_tiles import SCRATCH, Part, scripted
from .worker_pool import run_parts
from .workspace import Workspace

_GROUP = 4
"""Query tiles in one part of a call, fewer in small calls: work per row is done for all of them at once."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rows: list | None,
                    backwards: list[bool] | None, threshold: float, recording: bool, must_keep: MustKeep | None,
                    sm_scale: float, workspace: Workspace, computed: Tensor | None, mass: bool = False,
                    pool_skipped: bool = False) -> None:
    """`lite_attention` after its checks; writes `out` and `lse`, and the masks of `rows` while recording.

    q, k, v, out: [B, H, N, D] views; computed in float32 whatever the input dtype (torch's products of bfloat16 round
    scores to 8 bits, too few to decide with). `workspace` is not used: what is allocated here lives for one call.
    """
    batch, heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    if rows is None:
        active = torch.ones(batch, heads, tiles(seqlen_q), tiles(seqlen_k), dtype=torch.bool)
        backwards = [False] * batch
    else:
        active = unpack_words(torch.stack([m.words[r] for m, r in rows]).cpu(), tiles(seqlen_k))
    keep = torch.zeros_like(active) if recording else None
    # Else nothing is skipped, and nothing decided.
    pooled = _pool(k, v) if pool_skipped and (recording or not active.all()) else {}
    positions = [_visit_positions(active.shape[2], seqlen_k, direction) for direction in (False, True)]
    group = max(1, min(_GROUP, active[..., 0].numel() // (4 * torch.get_num_threads())))

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        attend = scripted(q.device.type)
        scratch = torch.empty(SCRATCH, device=q.device)

        def work(place: tuple[int, int, int]) -> None:
            b, h, first = place
            tile_range = slice(first, first + group)
            token_range = slice(first * TILE, (first + group) * TILE)
            attend(Part(q[b, h, token_range], k[b, h], v[b, h], out[b, h, token_range],
                        None if lse is None else lse[b, h, token_range], active[b, h, tile_range],
                        None if keep is None else keep[b, h, tile_range], positions[backwards[b]][tile_range],
                        pooled.get((b, h), [])), scratch, threshold * math.log(2), sm_scale, mass)

        return work

    counts = active.sum(-1)
    places = [(b, h, first) for b in range(batch) for h in range(heads) for first in range(0, active.shape[2], group)]
    cost = {(b, h, first): int(counts[b, h, first:first + group].sum()) for b, h, first in places}
    run_parts(make_worker, sorted(places, key=lambda place: -cost[place]), q.device)
    if computed is not None:
        computed.view(-1)[:1].add_(int(counts.sum()))
    if keep is not None:
        if must_keep is not None:
            keep |= must_keep.tile_mask(seqlen_q, seqlen_k)
        kept = pack_bits(keep).to(q.device)
        for b, (m, r) in enumerate(rows):
            m.words[r] &= kept[b]


def _pool(k: Tensor, v: Tensor) -> dict[tuple[int, int], list[Tensor]]:
    """Pooled keys and values of each (batch_entry, head)."""
    pooled: dict[tuple[int, int], list[Tensor]] = {}

    def pool(place: tuple[int, int]) -> None:
        x: Pooled = pool_tiles(*(x[place][None, None] for x in (k, v)))
        pooled[place] = [x.keys[0, 0], x.values[0, 0], x.log_counts, x.covariance[0, 0]]

    run_parts(lambda: pool, [(b, h) for b in range(k.shape[0]) for h in range(k.shape[1])], k.device)
    return pooled


def _visit_positions(query_tiles: int, seqlen_k: int, backwards: bool) -> Tensor:
    """int64 [QT, KT]: when each query tile visits each key tile: its own tile first, then ascending or descending, a
    last tile with fewer keys last. Tiles that are not active only leave gaps."""
    n_tiles, whole = tiles(seqlen_k), seqlen_k // TILE
    ascending = torch.arange(n_tiles)
    if backwards:
        ascending[:whole] = ascending[:whole].flip(0)
    positions = ascending.repeat(query_tiles, 1)
    own = torch.arange(min(query_tiles, whole))
    positions[own] += positions[own] < ascending[own, None]
    positions[own, own] = 0
    return positions
