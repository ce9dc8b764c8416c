"""Skip masks as small pictures in main memory, for reports after the run."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import TILE, SkipMask, tiles
from .config import BlockSet
from .kept import RowName
from .policy import VideoTokens
from .state import LayerKey

MAX_LAYERS, MAX_HEADS = 4, 2
MAX_SIDE = 512
"""Tiles a side; above it so many tiles share a cell that no side is longer."""


@dataclass(frozen=True)
class MaskChoice:
    """Which masks to keep, at most MAX_LAYERS x MAX_HEADS of them.

    Attributes:
        layers: blocks; empty chooses some, evenly spread over the model.
        heads: empty for all heads at once and the one that skips most.
    """

    layers: BlockSet = BlockSet()
    heads: BlockSet = BlockSet()


@dataclass(frozen=True)
class MaskPicture:
    """A layer's skip mask at the end of a run.

    Attributes:
        layer: its name.
        head: number, or None where `skipped` is the mean over all heads.
        heads: of the layer.
        skipped: uint8 [query rows, key columns] on the CPU, skipped share x 255.
        tiles: query tiles, key tiles.
        share: skipped share of the whole mask, 0..1.
        frame_edges: first token of each latent frame, and the end of the last, in tiles; empty where the layout is not
            known.
    """

    layer: str
    head: int | None
    heads: int
    skipped: Tensor
    tiles: tuple[int, int]
    share: float
    frame_edges: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.layer}, all {self.heads} heads" if self.head is None else f"{self.layer}, head {self.head}"


def mask_pictures(masks: Mapping[LayerKey, Mapping[Hashable, SkipMask]], choice: MaskChoice,
                  layout: tuple[int | VideoTokens, int] | None = None) -> list[MaskPicture]:
    """Pictures of the chosen masks, of the first conditioning of each. Synchronises with the masks' device.

    Args:
        masks: see `MaskTable.all_masks`; those that have not recorded are left out.
        layout: (tokens of the video, tokens of one latent frame), or None if unknown.
    """
    layers: dict[str, dict[Hashable, SkipMask]] = {}
    for key, rows in masks.items():
        recorded = {row: mask for row, mask in rows.items() if mask.passes[0]}
        if recorded:
            layers.setdefault(key.profile_name, recorded)
    pictures = []
    for name in _chosen_layers(sorted(layers, key=_in_order), choice.layers):
        mask = min(layers[name].items(), key=lambda item: _role(item[0]))[1].to("cpu")
        edges = frame_edges(mask.seqlen_q, layout)
        per_head = [_one_head(mask, head) for head in range(mask.heads)]
        shares = [1 - float(bits.float().mean()) for bits in per_head]
        heads = [h for h in range(mask.heads) if choice.heads.holds(h, mask.heads)]
        size = tiles(mask.seqlen_q), tiles(mask.seqlen_k)
        if not heads:
            mean = torch.zeros(size)
            for bits in per_head:
                mean += ~bits
            mean /= mask.heads
            pictures.append(MaskPicture(name, None, mask.heads, _cells(mean), size, sum(shares) / len(shares), edges))
            heads = [max(range(mask.heads), key=lambda h: shares[h])]
        pictures += [MaskPicture(name, h, mask.heads, _cells((~per_head[h]).float()), size, shares[h], edges)
                     for h in heads[:MAX_HEADS]]
    return pictures


def frame_edges(seqlen: int, layout: tuple[int | VideoTokens, int] | None) -> tuple[float, ...]:
    """Where latent frames start in a sequence, and where the last ends, in tiles; empty if that is not certain."""
    if layout is None:
        return ()
    video, per_frame = VideoTokens.of(layout[0]), layout[1]
    front, behind = video.ends(seqlen)
    if per_frame < 1 or video.count % per_frame or front + video.count + behind != seqlen:
        return ()
    return tuple((front + at) / TILE for at in range(0, video.count + 1, per_frame))


def _one_head(mask: SkipMask, head: int) -> Tensor:
    """bool [QT, KT]: active tiles. Head by head, because unpacking takes 32 times the memory of the words."""
    words = mask.words[:1, head:head + 1].contiguous()
    return SkipMask(words, mask.seqlen_q, mask.seqlen_k).to_bool()[0, 0]


def _cells(share: Tensor) -> Tensor:
    factor = -(-max(share.shape) // MAX_SIDE)
    if factor > 1:
        share = F.avg_pool2d(share[None], factor, ceil_mode=True)[0]
    return (share * 255).round().to(torch.uint8)


def _in_order(name: str) -> list:
    """Numbers in names by their value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _chosen_layers(names: list[str], blocks: BlockSet) -> list[str]:
    numbers = [int(found.group()) if (found := re.search(r"\d+", name)) else -1 for name in names]
    total = max(numbers, default=-1) + 1
    named = [name for name, number in zip(names, numbers, strict=True) if number >= 0 and blocks.holds(number, total)]
    if named:
        return named[:MAX_LAYERS]
    count = min(MAX_LAYERS, len(names))
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def _role(row: Hashable) -> tuple[int, int]:
    return row.role if isinstance(row, RowName) else (0, 0)
