"""The skip mask: one bit per 128 x 128 tile, and the only place that knows how bits lie in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Query rows and keys per mask bit, on every GPU and every backend. Compute tiles are a launch detail."""

WORD_BITS = 32
MAX_KEY_TILES = 32767
"""Tile numbers travel as int16 from the expansion to the attention kernel: 4.1 million keys."""


def tiles(seqlen: int) -> int:
    """Number of 128-token tiles that cover `seqlen` tokens."""
    return -(-seqlen // TILE)


def mask_shape(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int, int]:
    """Shape [B, H, QT, W] of the int32 words for these lengths; W = ceil(ceil(N_k / 128) / 32)."""
    return batch, heads, tiles(seqlen_q), -(-tiles(seqlen_k) // WORD_BITS)


def mask_nbytes(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> int:
    """Bytes of a mask of this shape, from the numbers alone (nothing is allocated)."""
    b, h, qt, w = mask_shape(batch, heads, seqlen_q, seqlen_k)
    return 4 * b * h * qt * w


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., KT] -> int32 [..., W]; bit `t & 31` of word `t >> 5` is tile t, unused bits are 0."""
    n = bits.shape[-1]
    words = -(-n // WORD_BITS)
    padded = torch.nn.functional.pad(bits.to(torch.int64), (0, words * WORD_BITS - n))
    weights = torch.ones(WORD_BITS, dtype=torch.int64, device=bits.device) << torch.arange(
        WORD_BITS, device=bits.device
    )
    unsigned = (padded.unflatten(-1, (words, WORD_BITS)) * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack_words(words: Tensor, key_tiles: int) -> Tensor:
    """int32 [..., W] -> bool [..., KT]."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :key_tiles].bool()


def popcount(words: Tensor) -> Tensor:
    """Set bits in all of `words` (int32), as an int64 scalar on its device; no synchronisation."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).sum(dtype=torch.int64)


@dataclass(frozen=True)
class MustKeep:
    """Token ranges whose tiles are never dropped, e.g. text tokens in a joint text + video sequence.

    Args:
        keys: (start, stop) ranges of key tokens. Start rounds down and stop rounds up to whole tiles.
        queries: (start, stop) ranges of query tokens, rounded in the same way: their tiles keep every key.
    """

    keys: tuple[tuple[int, int], ...] = ()
    queries: tuple[tuple[int, int], ...] = ()

    def check(self, seqlen_q: int, seqlen_k: int) -> None:
        """Raises:
            ValueError: a range that is empty, reversed or outside its sequence.
        """
        for name, ranges, length in (("keys", self.keys, seqlen_k), ("queries", self.queries, seqlen_q)):
            for start, stop in ranges:
                if not 0 <= start < stop <= length:
                    raise ValueError(
                        f"must_keep.{name} holds ({start}, {stop}); a range needs 0 <= start < stop <= {length}"
                    )

    def tile_mask(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """bool [QT, KT] on the CPU: True where a tile must stay. Raises as `check`."""
        self.check(seqlen_q, seqlen_k)
        keep = torch.zeros(tiles(seqlen_q), tiles(seqlen_k), dtype=torch.bool)
        for start, stop in self.keys:
            keep[:, start // TILE:tiles(stop)] = True
        for start, stop in self.queries:
            keep[start // TILE:tiles(stop), :] = True
        return keep


class SkipMask:
    """Which 128 x 128 (query tile, key tile) pairs are still computed, for each batch row and head.

    Args:
        words: int32 [B, H, QT, W], the bits; rows contiguous, bits at or beyond KT are zero.
        seqlen_q, seqlen_k: tokens. QT = ceil(seqlen_q / 128), KT = ceil(seqlen_k / 128), W = ceil(KT / 32).

    Attributes:
        passes: recording passes that each batch row has seen; its parity is the visit direction.

    A mask starts with every tile active and only shrinks until `reset`. Storage is allocated outside
    inference mode, because another thread may have to update it there (ComfyUI's multi-GPU workers).
    Source: LiteAttention, arXiv 2511.11062, section 3 (skip mask); one bit here, int16 lists upstream.
    """

    __slots__ = ("words", "seqlen_q", "seqlen_k", "passes")

    def __init__(self, words: Tensor, seqlen_q: int, seqlen_k: int, passes: Sequence[int] | None = None):
        expected = mask_shape(words.shape[0], words.shape[1], seqlen_q, seqlen_k) if words.dim() == 4 else None
        if words.dtype != torch.int32 or tuple(words.shape) != expected or not words.is_contiguous():
            raise ValueError(
                f"words is {words.dtype} {list(words.shape)}; a mask for {seqlen_q} x {seqlen_k} tokens needs a "
                f"contiguous int32 [B, H, {tiles(seqlen_q)}, {-(-tiles(seqlen_k) // WORD_BITS)}]"
            )
        if tiles(seqlen_k) > MAX_KEY_TILES:
            raise ValueError(f"seqlen_k is {seqlen_k}; at most {MAX_KEY_TILES * TILE} keys have a tile number")
        self.words = words
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.passes = list(passes) if passes is not None else [0] * words.shape[0]

    @classmethod
    def full(cls, batch: int, heads: int, seqlen_q: int, seqlen_k: int | None = None,
             device: torch.device | str = "cpu") -> SkipMask:
        """A mask with every tile active. `seqlen_k` defaults to `seqlen_q`."""
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        with torch.inference_mode(False):
            words = torch.empty(mask_shape(batch, heads, seqlen_q, seqlen_k), dtype=torch.int32, device=device)
        mask = cls(words, seqlen_q, seqlen_k)
        mask.reset()
        return mask

    @classmethod
    def from_bool(cls, bits: Tensor, seqlen_q: int, seqlen_k: int) -> SkipMask:
        """A mask from bool [B, H, QT, KT], True = active."""
        expected = (tiles(seqlen_q), tiles(seqlen_k))
        if bits.dtype != torch.bool or bits.dim() != 4 or tuple(bits.shape[2:]) != expected:
            raise ValueError(
                f"bits is {bits.dtype} {list(bits.shape)}; needed: bool [B, H, {expected[0]}, {expected[1]}]")
        with torch.inference_mode(False):
            words = pack_bits(bits.clone()).contiguous()
        return cls(words, seqlen_q, seqlen_k)

    @property
    def batch(self) -> int:
        return self.words.shape[0]

    @property
    def heads(self) -> int:
        return self.words.shape[1]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.words.numel() * 4

    @property
    def total_tiles(self) -> int:
        """Tiles of a dense call over all rows and heads."""
        return self.batch * self.heads * tiles(self.seqlen_q) * tiles(self.seqlen_k)

    def active_tiles(self) -> Tensor:
        """int64 scalar on the mask's device: active tiles over all rows and heads; does not synchronise."""
        return popcount(self.words)

    def density(self) -> float:
        """Active tiles / all tiles, 0..1 (users see 1 - density). Synchronises with the device."""
        return self.active_tiles().item() / self.total_tiles

    def to_bool(self) -> Tensor:
        """bool [B, H, QT, KT], True = active."""
        return unpack_words(self.words, tiles(self.seqlen_k))

    def head_bits(self, batch_entry: int, head: int) -> Tensor:
        """bool [QT, KT] of one head, True = active: unpacking takes 32 times the memory of the words."""
        return unpack_words(self.words[batch_entry, head], tiles(self.seqlen_k))

    def reset(self) -> None:
        """Every tile active again, and the visit direction back to the first pass. In place."""
        key_tiles = tiles(self.seqlen_k)
        self.words.fill_(-1)
        if key_tiles % WORD_BITS:
            self.words[..., -1] = (1 << (key_tiles % WORD_BITS)) - 1
        self.passes = [0] * self.batch

    def clone(self) -> SkipMask:
        """An independent copy."""
        with torch.inference_mode(False):
            return SkipMask(self.words.clone(), self.seqlen_q, self.seqlen_k, self.passes)

    def to(self, device: torch.device | str) -> SkipMask:
        """The same mask on another device (a copy, also where the device is the same)."""
        with torch.inference_mode(False):
            words = self.words.to(device, copy=True)
        return SkipMask(words, self.seqlen_q, self.seqlen_k, self.passes)

    def __repr__(self) -> str:
        return (f"SkipMask(batch={self.batch}, heads={self.heads}, seqlen_q={self.seqlen_q}, "
                f"seqlen_k={self.seqlen_k}, device={self.device}, passes={self.passes})")
