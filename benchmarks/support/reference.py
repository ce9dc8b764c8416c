"""What a contender's output is held against: attention in float32 on sampled query rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.masks import TILE
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """`error`: relative L2 over all sampled rows; `worst_row`: of the worst one. NaN where the output holds NaN."""

    error: float
    worst_row: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """A single row may be three times as far off as all together: a missing tile shows there first."""
        return self.error <= self.tolerance and self.worst_row <= 3 * self.tolerance


def sampled_rows(tokens: int, count: int = 32) -> list[int]:
    """Query rows to look at: the first and the last tile's both ends (the last may be ragged), the rest spread."""
    last_tile = (tokens - 1) // TILE * TILE
    rows = {0, min(TILE, tokens) - 1, last_tile, tokens - 1}
    rows |= {(2 * i + 1) * tokens // (2 * count) for i in range(count)}
    return sorted(rows)


def sampled_heads(heads: int, count: int = 4) -> list[int]:
    """Up to `count` heads, first and last among them."""
    return sorted({round(i * (heads - 1) / max(1, count - 1)) for i in range(count)})


class Reference:
    """Float32 attention of sampled rows over all keys, or over the keys of active tiles.

    Args:
        q, k, v: [1, H, N, D].
        bits: bool [1, H, QT, KT], True = active, or None for dense.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None = None):
        self.heads = sampled_heads(q.shape[1])
        rows = sampled_rows(q.shape[2])
        self.rows = torch.tensor(rows, device=q.device)
        expected = []
        for head in self.heads:
            scores = (q[0, head, self.rows].float() @ k[0, head].float().T) * q.shape[-1] ** -0.5
            if bits is not None:
                active = bits[0, head].to(q.device)[self.rows // TILE]
                scores.masked_fill_(~active.repeat_interleave(TILE, 1)[:, :k.shape[2]], -torch.inf)
            expected.append(scores.softmax(-1) @ v[0, head].float())
        self.expected = torch.stack(expected)

    def check(self, out: Tensor, tolerance: float) -> Check:
        """How far `out` [1, H, N, D] is off on the sampled rows of the sampled heads."""
        got = torch.stack([out[0, head, self.rows] for head in self.heads]).float()
        rows = (got - self.expected).norm(dim=-1) / self.expected.norm(dim=-1)
        error = (got - self.expected).norm() / self.expected.norm()
        return Check(error.item(), rows.max().item(), tolerance)


def poison(like: Tensor) -> None:
    """Fill the memory that the next output will most likely get with NaN: the allocator hands out again what was just
    let go, and the output of the contender before would hide a row that this one never writes."""
    torch.full_like(like, torch.nan)
