"""The rule of `lite_attention` in plain float64 loops, written without looking at the backends; and data that drops.

Plain Gaussian q and k drop nothing and would make every mask test vacuous: key tiles here differ in strength.
"""

import math
from dataclasses import dataclass

import torch

TILE = 128


@dataclass
class Oracle:
    """out [B, H, Nq, D] and lse [B, H, Nq] in float64; keep and margin [B, H, QT, KT].

    margin: how far (log2) the deciding row was from the other decision; inf for tiles not visited.
    """

    out: torch.Tensor
    lse: torch.Tensor
    keep: torch.Tensor
    margin: torch.Tensor


def order(active, own, backwards, n_keys):
    """Visit order of one query tile's active key tiles."""
    last = len(active) - 1
    ragged = n_keys % TILE != 0
    tail = [last] if ragged and active[last] else []
    rest = [t for t in range(len(active)) if active[t] and t not in tail]
    first = [own] if own in rest else []
    middle = [t for t in rest if t != own]
    return first + (middle[::-1] if backwards else middle) + tail


def inside_tiles(k, x):
    """[D, D] float64: mean over all keys of (k - mean of k's tile)(x - mean of x's tile).T. k, x: [N, D]."""
    total = 0
    for start in range(0, k.shape[0], TILE):
        a, b = k[start:start + TILE], x[start:start + TILE]
        total = total + (a - a.mean(0)).T @ (b - b.mean(0))
    return total / k.shape[0]


def with_stand_ins(q, k, v, active, scale):
    """Output and log-sum-exp of one query tile; q: [rows, D], scaled; k, v: [N, D]; active: bool [KT]."""
    scores, values = [], []
    for t, on in enumerate(active.tolist()):
        keys, vals = k[t * TILE:(t + 1) * TILE], v[t * TILE:(t + 1) * TILE]
        if on:
            scores.append(q @ keys.T)
            values.append(vals)
        else:
            scores.append(q @ keys.mean(0, keepdim=True).T + math.log(keys.shape[0]))
            values.append(vals.mean(0, keepdim=True))
    scores, values = torch.cat(scores, 1), torch.cat(values)
    weights = torch.softmax(scores, 1)
    skipped = torch.cat([torch.zeros(min(TILE, k.shape[0] - t * TILE)) if on else torch.ones(1)
                         for t, on in enumerate(active.tolist())]).bool()
    s = variance(q, k)
    shift = (q @ inside_tiles(k, v)) * torch.exp(-s / 2)[:, None]
    return weights @ values + weights[:, skipped].sum(1, keepdim=True) * shift, torch.logsumexp(scores, 1)


def variance(q, k):
    """s of each row of the scaled q."""
    return ((q @ inside_tiles(k, k)) * q).sum(1)


def attention(q, k, v, active, threshold, backwards=False, sm_scale=None, must=None, mass=False, pool_skipped=False):
    """Everything from the docstring of `lite_attention`, one recording pass. q, k, v: [B, H, N, D], any float dtype.

    active: bool [B, H, QT, KT]. backwards: bool, or one per batch row. must: bool [QT, KT]. What NaN and Inf in
    the inputs do follows from float64 arithmetic over the visited tiles.
    """
    q, k, v = (x.double() for x in (q, k, v))
    batch, heads, n_q, d = q.shape
    n_k = k.shape[2]
    scale = d ** -0.5 if sm_scale is None else sm_scale
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads, n_q), -math.inf, dtype=torch.float64)
    keep = torch.zeros_like(active)
    margin = torch.full(active.shape, math.inf, dtype=torch.float64)
    for b in range(batch):
        back = backwards if isinstance(backwards, bool) else backwards[b]
        for h in range(heads):
            for qt in range(active.shape[2]):
                rows = slice(qt * TILE, min(n_q, qt * TILE + TILE))
                visited = order(active[b, h, qt].tolist(), qt, back, n_k)
                limits = torch.full((rows.stop - rows.start,), float(threshold), dtype=torch.float64)
                if pool_skipped:
                    scaled = q[b, h, rows] * scale
                    out[b, h, rows], lse[b, h, rows] = with_stand_ins(scaled, k[b, h], v[b, h], active[b, h, qt], scale)
                    stake = (1 - torch.exp(-variance(scaled, k[b, h]))).clamp(1 / 64, 1)
                    limits = torch.minimum(limits - torch.log2(stake), torch.tensor(max(threshold, -1.0)))
                if not visited:
                    continue
                scores = q[b, h, rows] @ k[b, h].T
                reference = torch.full((scores.shape[0],), -math.inf, dtype=torch.float64)
                spoiled = torch.zeros(scores.shape[0], dtype=torch.bool)
                for t in visited:
                    top = scores[:, t * TILE:(t + 1) * TILE].max(1).values
                    spoiled |= top.isnan() | (top == math.inf)
                    # A row of nothing but -inf so far has no maximum to be below.
                    if mass:
                        sums = [torch.logsumexp(scores[:, u * TILE:(u + 1) * TILE] * scale, 1)
                                for u in visited[:visited.index(t) + 1]]
                        share = sums[-1] - torch.logsumexp(torch.stack(sums), 0)
                        above = (share / math.log(2) - limits).nan_to_num(nan=math.inf)
                    else:
                        above = ((top - reference) * scale / math.log(2) - limits).nan_to_num(nan=math.inf)
                    keep[b, h, qt, t] = bool((spoiled | (above > 0)).any())
                    margin[b, h, qt, t] = math.inf if spoiled.any() else above.max().abs()
                    reference = torch.maximum(reference, top)
                if pool_skipped:
                    continue
                columns = torch.cat([torch.arange(t * TILE, min(n_k, t * TILE + TILE)) for t in sorted(visited)])
                seen = scores[:, columns] * scale
                out[b, h, rows] = torch.softmax(seen, -1) @ v[b, h, columns]
                lse[b, h, rows] = torch.logsumexp(seen, -1)
    if must is not None:
        keep |= must & active
    return Oracle(out, lse, keep, margin)


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
