"""The torch backend: CPU, MPS and any GPU without Triton. One query tile at a time, active key tiles only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask import TILE, MustKeep, pack_bits, tiles, unpack_words
from .pooled import pool_tiles
from .torch_tiles import Part, scratch_elements, scripted
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
    pooling = pool_skipped and (recording or not bool(active.all()))  # else nothing is skipped, and nothing decided
    positions = [_visit_positions(active.shape[2], seqlen_k, direction) for direction in (False, True)]
    counts, threads = active.sum(-1), torch.get_num_threads()
    group = max(1, min(_GROUP, counts.numel() // (4 * threads)))
    prepared: dict[tuple[int, int], _Head] = {}

    def prepare(head: tuple[int, int]) -> None:
        prepared[head] = _Head.of(k[head], v[head], pooling)

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        attend = scripted(q.device.type)
        scratch = torch.empty(scratch_elements(q.shape[-1]), device=q.device)

        def work(place: tuple[int, int, int]) -> None:
            b, h, first = place
            at, tokens = (b, h, slice(first, first + group)), (b, h, slice(first * TILE, (first + group) * TILE))
            keys, values, pooled = prepared[b, h]
            attend(Part(q[tokens], keys, values, seqlen_k, out[tokens], None if lse is None else lse[tokens],
                        active[at], None if keep is None else keep[at], positions[backwards[b]][at[2]], pooled),
                   scratch, threshold * math.log(2), sm_scale, mass)

        return work

    every = [(b, h) for b in range(batch) for h in range(heads)]
    for some in (every[i:i + threads] for i in range(0, len(every), threads)):  # what is prepared stays small
        prepared.clear()
        run_parts(lambda: prepare, some, q.device)
        places = [(b, h, first) for b, h in some for first in range(0, active.shape[2], group)]
        places.sort(key=lambda x: -int(counts[x[0], x[1], x[2]:x[2] + group].sum()))  # the longest first
        run_parts(make_worker, places, q.device)
    if computed is not None:
        computed.view(-1)[:1].add_(int(counts.sum()))
    if keep is not None:
        if must_keep is not None:
            keep |= must_keep.tile_mask(seqlen_q, seqlen_k)
        kept = pack_bits(keep).to(q.device)
        for b, (m, r) in enumerate(rows):
            m.words[r] &= kept[b]


class _Head(NamedTuple):
    """Keys and values of one head as `Part` wants them, and `Part.pooled`."""

    keys: Tensor
    values: Tensor
    pooled: list[Tensor]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, pooling: bool) -> _Head:
        """Of k, v [N_k, D]. Copies where their rows are not side by side: products of rows far apart are slower."""
        n_tiles, n_keys = tiles(len(k)), len(k)
        keys, values = (F.pad(x, (0, 0, 0, n_tiles * TILE - n_keys)) if n_keys % TILE else x for x in (k, v))
        keys, values = (x.float().contiguous() for x in (keys, values))
        pooled = []
        if pooling:
            x = pool_tiles(*(x[None, None, :n_keys] for x in (keys, values)))
            pooled = [x.keys[0, 0], x.values[0, 0], x.log_counts, x.covariance[0, 0]]
        return cls(*(x.unflatten(0, (n_tiles, TILE)) for x in (keys, values)), pooled)


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
