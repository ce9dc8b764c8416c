"""The torch backend: CPU, MPS and any GPU without Triton. One query tile at a time, active key tiles only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

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
    scores to 8 bits, too few to decide with). `workspace` holds the keys and values of as many heads as threads.
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
    positions = {x: _visit_positions(active.shape[2], seqlen_k, x) for x in set(backwards)}
    counts, threads = active.sum(-1), torch.get_num_threads()
    group = max(1, min(_GROUP, counts.numel() // (4 * threads)))
    prepared: dict[tuple[int, int], _Head] = {}

    def prepare(place: tuple[Tensor | None, tuple[int, int]]) -> None:
        memory, head = place
        prepared[head] = _Head.of(k[head], v[head], memory, pooling)

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
    with _memory(k, v, threads, workspace) as memory:
        for some in (every[i:i + threads] for i in range(0, len(every), threads)):
            prepared.clear()
            run_parts(lambda: prepare, zip(memory, some, strict=False), q.device)
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
    def of(cls, k: Tensor, v: Tensor, memory: Tensor | None, pooling: bool) -> _Head:
        """Of k, v [N_k, D], as they are or copied to `memory` [2, KT * 128, D]."""
        n_keys, keys, values = len(k), k, v
        if memory is not None:
            keys, values = memory
            for x, copy in ((k, keys), (v, values)):
                copy[:n_keys].copy_(x)
                copy[n_keys:].zero_()
        pooled = []
        if pooling:
            x = pool_tiles(*(x[None, None, :n_keys] for x in (keys, values)))
            pooled = [x.keys[0, 0], x.values[0, 0], x.log_counts, x.covariance[0, 0]]
        return cls(*(x.unflatten(0, (-1, TILE)) for x in (keys, values)), pooled)


@contextmanager
def _memory(k: Tensor, v: Tensor, heads: int, workspace: Workspace) -> Iterator[Sequence[Tensor | None]]:
    """Memory for keys and values of each head that is computed at a time; None where k is as `Part` wants it."""
    seqlen, head_dim = k.shape[2:]
    if k.dtype == v.dtype == torch.float32 and seqlen % TILE == 0 and k.stride(2) == v.stride(2) == head_dim:
        yield [None] * heads
        return
    shape = heads, 2, tiles(seqlen) * TILE, head_dim
    with workspace.borrowed("keys and values", math.prod(shape), torch.float32, k.device) as memory:
        yield memory[:math.prod(shape)].view(shape)


def _visit_positions(query_tiles: int, seqlen_k: int, backwards: bool) -> Tensor:
    """int64 [QT, KT]: when each query tile visits each key tile: its own tile first, then ascending or descending, a
    last tile with fewer keys last. Tiles that are not active only leave gaps."""
    n_tiles, whole = tiles(seqlen_k), seqlen_k // TILE
    ascending = torch.arange(n_tiles)
    if backwards:
        ascending[:whole] = ascending[:whole].flip(0)
    positions = ascending.repeat(query_tiles, 1)
    own = min(query_tiles, whole)
    positions[:own].add_(positions[:own] < ascending[:own, None])
    positions.diagonal()[:own].zero_()
    return positions
