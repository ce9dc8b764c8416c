"""The rule in float64 (`kernels/reference.py`), and data that drops.

Plain Gaussian q and k drop nothing and would make every mask test vacuous: key tiles here differ in strength.
"""

import torch

from liteattention.kernels.reference import TILE, attention, order, variance

__all__ = ["TILE", "attention", "holes", "make", "order", "strengths", "variance"]


def holes(batch, heads, n_q, n_k, density, seed=1):
    """A start mask with random holes, bool [B, H, QT, KT]."""
    shape = batch, heads, -(-n_q // TILE), -(-n_k // TILE)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def strengths(n):
    return torch.tensor([3.0, 8.0, 0.0, 5.0, 1.0, 6.0, 2.0, 7.0])[torch.arange(n) // TILE % 8]


def make(batch, heads, n_q, n_k, d, dtype, layout="strided", seed=0):
    """q, k, v as [B, H, N, D] views: "strided" ([B, N, H, D] memory), "contiguous", or "fused" (one qkv buffer)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, d, generator=generator) for n in (n_q, n_k, n_k))
    q[..., 0] += 8
    k[..., 0] += strengths(n_k).view(1, -1, 1)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if layout == "fused":
        assert n_q == n_k
        fused = torch.stack([q, k, v], 2)
        q, k, v = fused.unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return tuple(x.contiguous() for x in (q, k, v)) if layout == "contiguous" else (q, k, v)
