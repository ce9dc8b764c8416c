"""All skip masks of one sampling run, and those that a later run or a report may read after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels import SkipMask
from .resize import resize
from .video_tokens import Grid

RESIZED = "q, k, v changed their size or dtype in mid-run; the masks were carried over"
SIZE_CHANGED = "q, k, v changed their size or dtype in mid-run; the masks started anew"
NO_MATCH = "continue_from has no mask for some layers or prompts of this run; those warm up as usual"


@dataclass(frozen=True)
class LayerKey:
    """One self-attention site of one network on one device, inside one context window.

    Attributes:
        model: identity of the network (two networks can share a run).
        block: block type and number, e.g. "double 3".
        ordinal: which self-attention of that block, for blocks that run several.
        window: the context window's frames, or None.
        piece: number of the piece of the queries, where they come in pieces, each with a mask of its own.
    """

    model: Hashable
    device: torch.device
    block: str
    ordinal: int = 0
    window: Hashable = None
    piece: int | None = None

    @property
    def name(self) -> str:
        """Display name; blocks that run several self-attentions number them from the second on."""
        return self.block if not self.ordinal else f"{self.block} #{self.ordinal + 1}"


class RowName(NamedTuple):
    """A batch entry of a run: (identity of its conditioning, the conditioning's number in the guider's list, row in its
    chunk). Another run with the same prompts has other identities, but the same roles."""

    uuid: Hashable
    number: int
    row: int

    @property
    def role(self) -> Hashable:
        return self.number, self.row


class Signature(NamedTuple):
    """What has to stay the same for a mask to go on as it is within a run.

    Attributes:
        heads: of the whole attention, also where a call has a group of them.
        grid: where the video lies, if known.
        queries: tokens that ask, where it is not all of them.
    """

    heads: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype
    grid: Grid | None = None
    queries: int | None = None

    def same_size(self, other: Signature) -> bool:
        """Whether a mask of this signature fits as it is; networks may differ in precision."""
        same = (*self[:3], self.queries) == (*other[:3], other.queries)
        return same and (self.grid == other.grid or None in (self.grid, other.grid))

    def fits(self, other: Signature) -> bool:
        """Whether a mask of this signature fits as it is or resized."""
        same_heads = (self.heads, self.head_dim) == (other.heads, other.head_dim)
        return self.same_size(other) or (same_heads and None not in (self.grid, other.grid))

    def __str__(self) -> str:
        return f"{self.heads} heads x {self.seqlen} tokens x {self.head_dim}"


@dataclass(frozen=True, eq=False)
class CarriedMask:
    """A mask of a finished run, in main memory."""

    key: LayerKey
    row: Hashable
    signature: Signature
    mask: SkipMask
    carried = True


class CarriedMasks:
    """The masks of a finished run, in main memory, for a run that continues it and for reports.

    A mask is found again by where it belongs (block, ordinal, context window) and by the role of its row. The network
    may be another one (Wan 2.2 has two with the same layers). Where that leaves a choice, the same network and the same
    conditioning win; where they do not settle it, nothing is carried over: a mask that is not certain is worse than a
    warm-up. At another size of the video a mask is carried over where both token grids are known.
    """

    def __init__(self, masks: Sequence[CarriedMask] = ()) -> None:
        self._places: dict[Hashable, list[CarriedMask]] = {}
        for carried in masks:
            self._places.setdefault(_place(carried.key, carried.row), []).append(carried)

    def __iter__(self) -> Iterator[CarriedMask]:
        return (carried for masks in self._places.values() for carried in masks)

    @property
    def nbytes(self) -> int:
        """Bytes of main memory."""
        return sum(carried.mask.nbytes for carried in self)

    def by_layer(self) -> dict[str, SkipMask]:
        """The mask of each layer's first conditioning, by the display name of the layer."""
        first: dict[str, CarriedMask] = {}
        for carried in self:
            if carried.key.piece is not None:
                continue
            held = first.get(carried.key.name)
            if held is None or _role(carried.row) < _role(held.row):
                first[carried.key.name] = carried
        return {name: carried.mask for name, carried in first.items()}

    def find(self, key: LayerKey, row: Hashable, signature: Signature,
             used: Collection[CarriedMask] = ()) -> tuple[CarriedMask | None, str]:
        """(the mask for this row, ""), or (None, why there is none). `used`: masks that other rows go on with."""
        there = [carried for carried in self._places.get(_place(key, row), []) if carried not in used]
        fitting = [carried for carried in there if carried.signature.fits(signature)]
        if there and not fitting:
            return None, (f"continue_from has masks for {there[0].signature}, this run needs {signature}, and how one "
                          "lies over the other is not known; the masks start anew")
        fitting = [carried for carried in fitting if carried.signature.same_size(signature)] or fitting
        for preferred in ([carried for carried in fitting if carried.row == row],
                          [carried for carried in fitting if carried.key.model == key.model]):
            if len(fitting) > 1 and preferred:
                fitting = [carried for carried in fitting if carried in preferred] or fitting
        return (fitting[0], "") if len(fitting) == 1 else (None, NO_MATCH)


def _place(key: LayerKey, row: Hashable) -> Hashable:
    return key.block, key.ordinal, key.window, key.piece, getattr(row, "role", row)


def _role(row: Hashable) -> tuple[int, int]:
    return row.role if isinstance(row, RowName) else (0, 0)


class Row:
    """The mask of one batch entry in one layer. `carried`: it comes from the run before, and needs no warm-up."""

    def __init__(self, mask: SkipMask, signature: Signature, carried: bool = False):
        self.signature, self.carried = signature, carried
        self._parts = {range(mask.heads): mask}

    @property
    def mask(self) -> SkipMask:
        """Of all heads."""
        return self.part(range(self.signature.heads))

    @property
    def recorded(self) -> bool:
        return self.mask.passes[0] > 0

    def part(self, heads: range) -> SkipMask:
        """The mask of some of the heads, on the same memory."""
        # Groups may change in mid-run: one has seen as many passes as those that it overlaps.
        passes = [max(part.passes[0] for other, part in self._parts.items()
                      if other.start < heads.stop and heads.start < other.stop)]
        if heads not in self._parts:
            whole = self._parts[range(self.signature.heads)]
            with torch.inference_mode(False):
                words = whole.words[:, heads.start:heads.stop]
            self._parts[heads] = SkipMask(words, whole.seqlen_q, whole.seqlen_k)
        self._parts[heads].passes = passes
        return self._parts[heads]


@dataclass(frozen=True)
class RowState:
    """A row before a call: whether its mask has recorded, and whether it was or will be carried over."""

    recorded: bool = False
    carried: bool = False


class MaskTable:
    """One mask of batch 1 per (layer, row), allocated once in its final size.

    Opened with a run and closed with it. There is no reset: a new run is a new table, so that a cached model or guider
    can never start with the last prompt's decisions. A row seen for the first time starts with every tile active.
    Locked, because ComfyUI's multi-GPU workers share the table.

    Args:
        allocating: context manager to hold around allocations (see `Workspace`).
        carried: masks of the run that this one continues.
        note: takes a sentence for the user and the display name of the layer.
    """

    def __init__(self, allocating: Callable[[], AbstractContextManager] = nullcontext,
                 carried: CarriedMasks | None = None, note: Callable[[str, str], None] = lambda text, layer: None):
        self.carried_rows = 0
        self.peak_bytes = 0
        self._carried = carried
        self._used: set[CarriedMask] = set()
        self._allocated = 0
        self._note = note
        self._allocating = allocating
        self._layers: dict[LayerKey, dict[Hashable, Row]] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all masks."""
        return self._allocated

    def states(self, key: LayerKey, names: Sequence[Hashable], signature: Signature,
               heads: range | None = None) -> list[RowState]:
        """What is known of the rows of a call over `heads` (None: all)."""
        with self._lock:
            rows = self._layers.get(key, {})
            return [RowState(row.part(heads or range(signature.heads)).passes[0] > 0, row.carried)
                    if (row := rows.get(name)) and row.signature == signature
                    else self._new_state(key, name, signature) for name in names]

    def _new_state(self, key: LayerKey, name: Hashable, signature: Signature) -> RowState:
        source, _ = self._source(key, name, signature)
        return RowState() if source is None else RowState(True, source.carried)

    def _source(self, key: LayerKey, name: Hashable, signature: Signature) -> tuple[Row | CarriedMask | None, str]:
        """(what a new row goes on with or None, what there is to say of it)."""
        held = self._layers.get(key, {}).get(name)
        if held is not None:
            return (held, RESIZED) if held.recorded and held.signature.fits(signature) else (None, SIZE_CHANGED)
        return (None, "") if self._carried is None else self._carried.find(key, name, signature, self._used)

    def open(self, key: LayerKey, names: Sequence[Hashable], signature: Signature) -> list[Row]:
        """The rows of a call; those that are new, or whose size or dtype has changed, are made.

        Raises:
            torch.OutOfMemoryError: no memory for a new mask; the rows that have one keep it.
        """
        with self._lock:
            rows = self._layers.setdefault(key, {})
            for name in names:
                held = rows.get(name)
                if held is None or held.signature != signature:
                    rows[name] = self._new_row(key, name, signature)
                    self._allocated += rows[name].mask.nbytes - (held.mask.nbytes if held is not None else 0)
            self.peak_bytes = max(self.peak_bytes, self._allocated)
            return [rows[name] for name in names]

    def _new_row(self, key: LayerKey, name: Hashable, signature: Signature) -> Row:
        source, note = self._source(key, name, signature)
        if note:
            self._note(note, key.name)
        with self._allocating():
            if source is None:
                return Row(SkipMask.full(1, signature.heads, signature.queries or signature.seqlen, signature.seqlen,
                                         key.device), signature)
            mask, before = source.mask.to(key.device), source.signature
            if not before.same_size(signature):
                mask = resize(mask, before.grid, signature.grid, signature.seqlen)
        if isinstance(source, CarriedMask):
            self.carried_rows += 1
            self._used.add(source)
        return Row(mask, signature, source.carried)

    def carry(self) -> CarriedMasks:
        """A copy in main memory of every mask that has recorded. Synchronises."""
        with self._lock:
            return CarriedMasks([CarriedMask(key, name, row.signature, row.mask.to("cpu"))
                                 for key, rows in self._layers.items() for name, row in rows.items()
                                 if row.recorded])

    def all_masks(self) -> dict[LayerKey, dict[Hashable, SkipMask]]:
        """A view of the state for tests."""
        return {key: {name: row.mask for name, row in rows.items()} for key, rows in self._layers.items()}

    def forget(self, key: LayerKey) -> None:
        """Drop a layer's masks, after a call on them failed half-way."""
        with self._lock:
            self._allocated -= sum(row.mask.nbytes for row in self._layers.pop(key, {}).values())

    def close(self) -> None:
        """Free every mask."""
        with self._lock:
            self._layers.clear()
            self._used.clear()
            self._allocated = 0
            self._carried = None
