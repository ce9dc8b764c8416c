"""`lite_attention`: checks, backend choice and the semantics that both backends share."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import choose_backend
from .errors import UnsupportedAttention
from .mask import TILE, MustKeep, SkipMask, tiles
from .precision import precision_choice
from .workspace import Workspace

HEAD_DIMS = (64, 96, 128)
CRITERIA = ("max", "mass")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MaskEntries = list[tuple[SkipMask, int]]
"""For each batch entry of a call: the mask that holds its bits, and the entry of that mask."""


def unsupported_call(q: Tensor, k: Tensor, v: Tensor, *, heads: int | None = None,
                     attn_mask: Tensor | None = None, sm_scale: float | None = None) -> UnsupportedAttention | None:
    """Why skip-mask attention cannot serve this call, or None if it can.

    Args as in `lite_attention`. Looks at shapes, dtypes, strides and devices only, never at data.
    """
    def no(argument: str, value: object, allowed: str, reason: str) -> UnsupportedAttention:
        return UnsupportedAttention(argument, value, allowed, reason)

    if attn_mask is not None:
        return no("attn_mask", f"a {list(attn_mask.shape)} tensor", "None", "attention mask given")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return no(f"{name}.dtype", x.dtype, "float16, bfloat16, float32", f"dtype {x.dtype} not supported")
        if x.dtype != q.dtype:
            return no(f"{name}.dtype", x.dtype, f"the dtype of q, {q.dtype}", "q, k, v differ in dtype")
        if x.device != q.device:
            return no(f"{name}.device", x.device, f"the device of q, {q.device}", "q, k, v on different devices")
        if x.requires_grad and torch.is_grad_enabled():
            return no(f"{name}.requires_grad", True, "False, or torch.no_grad(): there is no backward pass",
                      "gradients wanted")
        if x.dim() != (4 if heads is None else 3):
            return no(f"{name}.shape", list(x.shape), "[B, H, N, D], or [B, N, H*D] with heads=H",
                      "layout not supported")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return no(f"{name}.stride(-1)", x.stride(-1), "1", "last stride is not 1")
    if heads is not None and (heads < 1 or q.shape[-1] % heads):
        return no("heads", heads, f"a divisor of q.shape[-1] = {q.shape[-1]}", "layout not supported")
    if k.shape != v.shape:
        return no("v.shape", list(v.shape), f"the shape of k, {list(k.shape)}", "k and v differ in shape")
    n_axis, h_axis = (2, 1) if heads is None else (1, 2)
    if k.shape[0] != q.shape[0]:
        return no("k.shape[0]", k.shape[0], f"the batch of q, {q.shape[0]}", "q and k differ in batch")
    if k.shape[-1] != q.shape[-1] or k.shape[h_axis] != q.shape[h_axis]:
        return no("k.shape", list(k.shape), f"the heads and head_dim of q, {list(q.shape)} (no grouped queries)",
                  "grouped-query attention")
    head_dim = q.shape[-1] if heads is None else q.shape[-1] // heads
    if head_dim not in HEAD_DIMS:
        return no("head_dim", head_dim, ", ".join(map(str, HEAD_DIMS)), f"head_dim {head_dim} not supported")
    if min(q.shape[0], q.shape[h_axis], q.shape[n_axis], k.shape[n_axis]) < 1:
        return no("q.shape", list(q.shape), "at least one batch row, head, query and key", "empty call")
    if sm_scale is not None and not (math.isfinite(sm_scale) and sm_scale > 0):
        return no("sm_scale", sm_scale, "a finite number above 0", "softmax scale not positive")
    return None


def _never_traced(function):
    """`torch.compiler.disable` without its import, which brings Triton along: launches cannot be traced."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:  # nobody compiles
            return function(*args, **kwargs)
        if call.disabled is None:
            call.disabled = torch.compiler.disable(function)
        return call.disabled(*args, **kwargs)

    call.disabled = None
    return call


@_never_traced
def lite_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: SkipMask | Sequence[SkipMask] | None = None, *,
    threshold: float = -math.inf, criterion: str = "max", record: bool = True, pool_skipped: bool = False,
    must_keep: MustKeep | None = None,
    heads: int | None = None, attn_mask: Tensor | None = None, sm_scale: float | None = None,
    return_lse: bool = False, precision: str = "full", backend: str | None = None, workspace: Workspace | None = None,
    computed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the tiles that the skip mask still keeps.

    Semantics (LiteAttention, arXiv 2511.11062, section 3; the rule itself as in its released kernel):

    * A *tile* is 128 query rows x 128 keys, whatever the GPU. It is computed iff its bit is active; QK, softmax
      and PV of an inactive tile do not happen.
    * Visit order of a query tile's active key tiles: its own (diagonal) tile first, then the others ascending on
      the 1st, 3rd, … recording pass of that batch entry and descending on the 2nd, 4th, …; a last key tile with
      fewer than 128 keys always comes last.
    * While recording, a computed tile stays active iff for at least one valid query row::

          (max over the tile's keys of q·k  -  reference) * sm_scale * log2(e) > threshold

      where reference is the row's running maximum of q·k over the tiles visited *before* this one (-inf before
      the first, which therefore stays). The decision is used from the next call on; this call computes the tile.
    * With criterion "mass" it stays iff for at least one valid query row its share of the row's sum of exp(scores)
      over the tiles visited so far, itself included, is above 2 ** threshold. The sum only grows, so a dropped tile
      held at most that share of every row's attention, and n dropped tiles at most n * 2 ** threshold.
    * With `pool_skipped` a skipped tile of n keys takes part as one key, the mean of its keys, n times, and as the mean
      of its values, shifted by what the covariance of keys and values inside tiles tells (see `pooled.py`). While
      recording, each row's threshold is divided by the fraction of a tile's attention that pooling loses,
      1 - exp(-variance of the row's scores inside tiles), at least 1/64, up to a threshold of 1/2.
    * Tiles under `must_keep` stay. The mask only shrinks until `SkipMask.reset`.
    * threshold = -inf never drops and never counts as a recording pass: with every bit active the result is that
      of `mask=None` bit for bit.
    * NaN and Inf in q, k, v come out as in dense attention over the computed tiles (where a weight has underflowed
      to 0, Inf in v comes out as NaN or not at all, as it does in dense attention of that dtype); a row whose scores
      hold NaN or +Inf votes to keep every tile from there on, and so does one that has met nothing but -Inf.
    * A query tile without any active tile gives 0 (lse -inf), with `pool_skipped` that over pooled keys.

    Args:
        q: [B, H, N_q, D] with any strides (of tokens: below 2^24 elements) and a unit last one, or packed
           [B, N_q, H*D] with `heads`.
           float16, bfloat16 or float32; D is 64, 96 or 128. Never copied.
        k, v: the same layout, dtype and device with N_k keys.
        mask: one `SkipMask` of batch B, or B masks of batch 1 (one per batch entry, so that
            entries can be batched differently from call to call), or None for every tile. Rewritten in place while
            recording.
        threshold: log2, -inf..0. -10 drops tiles whose every weight is under 1/1024 of the row's strongest so far.
        criterion: "max" (the paper's) or "mass".
        record: False reads the mask and leaves it as it is.
        pool_skipped: let each skipped tile be represented by its means and one covariance per head, and not vanish.
            About 3 % of a call that skips 57 % of its tiles (by operations; not yet measured). With nothing skipped the
            result is that without it, bit for bit.
        must_keep: token ranges whose tiles stay.
        sm_scale: factor on q·k before softmax, default D ** -0.5.
        return_lse: also return the natural-log log-sum-exp of the scaled scores over computed tiles and pooled keys.
        precision: "full", "int8" or "auto" (see `precision_choice`). INT8 computes q·k from INT8 copies of q and k with
            a scale per row of q and per 128 keys, skips with a threshold lower by `INT8_GUARD`, and on GeForce
            architectures sums P·V in float16. There a NaN or Inf in q makes the results of its row NaN, one in k those
            of its head. With `return_lse`, and where the GPU has no fast INT8, the call is computed in full precision.
        backend: "triton", "torch", or None / "auto" (see `choose_backend`). A named backend never falls back.
        workspace: scratch memory to reuse between calls; without one it is allocated per call.
        computed: contiguous int64 tensor on q's device of any number of elements; the number of tiles computed is added
            to them, spread so that their sum is what counts.

    Returns:
        Output with the layout, shape and dtype of q (a [B, H, N, D] result has [B, N, H, D] memory, so that its
        packed view is free); with `return_lse` also float32 [B, H, N_q].

    Raises:
        UnsupportedAttention: the call cannot be served; names the argument. Nothing was written.
        ValueError: threshold, criterion, must_keep, precision or backend makes no sense.
        torch.OutOfMemoryError: also for INT8's copies of q, k, v; then nothing was written.
    """
    problem = unsupported_call(q, k, v, heads=heads, attn_mask=attn_mask, sm_scale=sm_scale)
    if problem is not None:
        raise problem
    if math.isnan(threshold) or threshold > 0:
        raise ValueError(f"threshold is {threshold}; it is a log2 value from -inf to 0")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; allowed: {', '.join(CRITERIA)}")
    if heads is not None:
        q, k, v = _split_heads(q, heads), _split_heads(k, heads), _split_heads(v, heads)
    if must_keep is not None:
        must_keep.check(q.shape[2], k.shape[2])
    if mask is None:
        mask = SkipMask.full(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
        record = pool_skipped = False
    entries = _mask_entries(mask, q, k)
    chosen = choose_backend(q.device, backend)
    batch, n_heads, seqlen_q, head_dim = q.shape
    packed = torch.empty(batch, seqlen_q, n_heads * head_dim, dtype=q.dtype, device=q.device)
    out = _split_heads(packed, n_heads)
    lse = torch.empty(batch, n_heads, seqlen_q, dtype=torch.float32, device=q.device) if return_lse else None
    recording = record and threshold > -math.inf
    # A reader follows the direction that the next recording pass would take; -inf has one direction only,
    # or the promise of bitwise equality with the dense run would depend on the mask's age.
    backwards = [bool(m.passes[e] & 1) and threshold > -math.inf for m, e in entries]
    arguments = (q, k, v, out, lse, entries, backwards, float(threshold), recording, must_keep,
                 head_dim ** -0.5 if sm_scale is None else float(sm_scale), workspace or Workspace(), computed)
    options = {"mass": criterion == "mass", "pool_skipped": pool_skipped}
    choice = precision_choice(q.device, head_dim, q.dtype, k.shape[2], precision, chosen)
    if chosen == "triton":
        from .triton_launch import triton_attention

        triton_attention(*arguments, int8=choice.name == "int8" and not return_lse, **options)
    else:
        from .torch_attention import torch_attention

        torch_attention(*arguments, **options)
    if recording:
        for m, e in entries:
            m.passes[e] += 1
    result = out if heads is None else packed
    return (result, lse) if return_lse else result


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*D] -> a [B, H, N, D] view."""
    batch, seqlen, width = x.shape
    stride_b, stride_n, _ = x.stride()
    head_dim = width // heads
    return x.as_strided((batch, heads, seqlen, head_dim), (stride_b, head_dim, stride_n, 1))


def _mask_entries(mask: SkipMask | Sequence[SkipMask], q: Tensor, k: Tensor) -> MaskEntries:
    masks = [mask] if isinstance(mask, SkipMask) else list(mask)
    entries = [(m, e) for m in masks for e in range(m.batch)]
    if len(entries) != q.shape[0]:
        raise UnsupportedAttention("mask", f"{len(entries)} rows", f"the batch of q, {q.shape[0]} rows",
                                   "mask for another shape")
    if len(set(map(id, masks))) != len(masks):
        raise UnsupportedAttention("mask", "the same mask for several batch rows", "one mask row per batch row",
                                   "mask row used twice")
    needed = q.shape[1], q.shape[2], k.shape[2]
    device = q.device
    for m in masks:
        if (m.heads, m.seqlen_q, m.seqlen_k) != needed:
            raise UnsupportedAttention(
                "mask", f"{m.heads} heads, {m.seqlen_q} x {m.seqlen_k} tokens",
                f"{q.shape[1]} heads, {q.shape[2]} x {k.shape[2]} tokens as in q and k", "mask for another shape")
        if m.device != device:
            raise UnsupportedAttention("mask.device", m.device, f"the device of q, {q.device}",
                                       "mask on another device")
    return entries


def call_tiles(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> int:
    """Tiles of a dense call with these lengths, over all batch rows and heads."""
    return batch * heads * tiles(seqlen_q) * tiles(seqlen_k)


__all__ = ["CRITERIA", "DTYPES", "HEAD_DIMS", "TILE", "call_tiles", "lite_attention", "unsupported_call"]
