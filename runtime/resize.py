"""A skip mask for another size of the same video."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..kernels import TILE, SkipMask, tiles
from .video_tokens import Grid


def resize(mask: SkipMask, before: Grid, after: Grid, seqlen: int) -> SkipMask:
    """A mask over `seqlen` tokens in which a tile is active where any tile of `mask` that covers its tokens is.

    A token covers the same share of frames, rows and columns in both grids: one frame, row or column lies over all of
    the other grid that it overlaps. Tiles with tokens beside the grid are active.

    Args:
        mask: of batch 1, over one sequence, that holds the grid `before`.
        after: the grid in the new sequence.
    """
    cover = _covering_tiles(before, mask.seqlen_q, after, seqlen, mask.device)
    count, words = tiles(seqlen), []
    for head in range(mask.heads):  # one by one: bits take 32 times the memory of the words, and floats more
        bits = (cover @ mask.head_bits(0, head).to(cover.dtype) @ cover.T) > 0
        bits[:tiles(after.offset)] = bits[:, :tiles(after.offset)] = True
        if after.stop < seqlen:
            bits[after.stop // TILE:] = bits[:, after.stop // TILE:] = True
        words.append(SkipMask.from_bool(bits.view(1, 1, count, count), seqlen, seqlen).words)
    with torch.inference_mode(False):
        return SkipMask(torch.cat(words, 1), seqlen, seqlen, mask.passes)


@lru_cache(maxsize=4)
def _covering_tiles(before: Grid, seqlen_before: int, after: Grid, seqlen: int, device: torch.device) -> Tensor:
    """float32 [tiles of `seqlen`, tiles of `seqlen_before`]: 1 where tokens of the two lie over each other. Cached, for
    all layers of a model have the same."""
    spans = [_overlap(old, new) for old, new in zip(before[1:], after[1:], strict=True)]
    tile = torch.arange(after.offset, after.stop) // TILE
    cover = torch.zeros(tiles(seqlen), tiles(seqlen_before))
    for shift in product(*(range(int((last - first).max()) + 1) for first, last in spans)):
        frame, row, column = (torch.minimum(first + step, last)
                              for step, (first, last) in zip(shift, spans, strict=True))
        token = (frame.view(-1, 1, 1) * before.rows + row.view(-1, 1)) * before.columns + column
        cover[tile, (before.offset + token.flatten()) // TILE] = 1
    return cover.to(device)


def _overlap(old: int, new: int) -> tuple[Tensor, Tensor]:
    """(first, last): for each of `new` equal parts of an axis, those of `old` that it overlaps."""
    part = torch.arange(new)
    return part * old // new, ((part + 1) * old - 1) // new
