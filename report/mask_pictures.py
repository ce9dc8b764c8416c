"""Skip masks of a finished run as small pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LAYERS, MAX_HEADS = 4, 2
MAX_SIDE = 512
"""Tiles a side; above it so many tiles share a cell that no side is longer."""


class Mask(Protocol):
    """A skip mask of one batch entry."""

    heads: int
    seqlen_q: int

    def head_bits(self, batch_entry: int, head: int) -> Tensor:
        """bool [QT, KT], True = active."""


Numbers = Callable[[int, int], bool]
"""Whether number i of n is chosen."""


@dataclass(frozen=True)
class MaskPicture:
    """A layer's skip mask at the end of a run.

    Attributes:
        layer: its display name.
        head: number, or None where `skipped` is the mean over all heads.
        heads: of the layer.
        skipped: uint8 [rows, columns] on the CPU, skipped share x 255.
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
        """Display name, "block 3, head 5"."""
        return f"{self.layer}, all {self.heads} heads" if self.head is None else f"{self.layer}, head {self.head}"


def mask_pictures(masks: Mapping[str, Mask], layers: Numbers, heads: Numbers,
                  frame_edges: Callable[[int], tuple[float, ...]] = lambda seqlen: ()) -> list[MaskPicture]:
    """At most MAX_LAYERS x MAX_HEADS pictures.

    Args:
        masks: by the display name of the layer.
        layers: chooses blocks; where it chooses none, some are drawn, evenly spread over the model.
        heads: chooses heads; where it chooses none, all heads at once are drawn, and the head that skips most.
        frame_edges: tokens of a sequence -> see `MaskPicture`.
    """
    pictures = []
    for name in _chosen_layers(sorted(masks, key=_in_order), layers):
        mask = masks[name]
        bits = [mask.head_bits(0, head).cpu() for head in range(mask.heads)]
        shares = [1 - float(x.float().mean()) for x in bits]
        size, edges = tuple(bits[0].shape), frame_edges(mask.seqlen_q)
        chosen = [head for head in range(mask.heads) if heads(head, mask.heads)]
        if not chosen:
            mean = torch.stack(bits).logical_not_().float().mean(0)
            pictures.append(MaskPicture(name, None, mask.heads, _cells(mean), size, sum(shares) / len(shares), edges))
            chosen = [max(range(mask.heads), key=lambda head: shares[head])]
        pictures += [MaskPicture(name, head, mask.heads, _cells((~bits[head]).float()), size, shares[head], edges)
                     for head in chosen[:MAX_HEADS]]
    return pictures


def _cells(share: Tensor) -> Tensor:
    factor = -(-max(share.shape) // MAX_SIDE)
    if factor > 1:
        share = F.avg_pool2d(share[None], factor, ceil_mode=True)[0]
    return (share * 255).round().to(torch.uint8)


def _in_order(name: str) -> list:
    """Numbers in names by their value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _chosen_layers(names: list[str], layers: Numbers) -> list[str]:
    numbers = [int(found.group()) if (found := re.search(r"\d+", name)) else -1 for name in names]
    total = max(numbers, default=-1) + 1
    named = [name for name, number in zip(names, numbers, strict=True) if number >= 0 and layers(number, total)]
    if named:
        return named[:MAX_LAYERS]
    count = min(MAX_LAYERS, len(names))
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
