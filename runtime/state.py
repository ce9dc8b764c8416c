"""All skip masks of one sampling run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from ..kernels import SkipMask
from .kept import KeptMasks, Signature

MB = 2**20


@dataclass(frozen=True)
class LayerKey:
    """One self-attention site of one network on one device, inside one context window.

    Attributes:
        model: identity of the network (two networks can share a run).
        name: block type and number, e.g. "double 3".
        ordinal: which self-attention of that block, for blocks that run several.
        window: the context window's frames, or None.
    """

    model: Hashable
    device: torch.device
    name: str
    ordinal: int = 0
    window: Hashable = None

    @property
    def profile_name(self) -> str:
        """The layer in a profile: blocks that run several self-attentions number them from the second on."""
        return self.name if not self.ordinal else f"{self.name} #{self.ordinal + 1}"


@dataclass
class _Row:
    mask: SkipMask
    signature: Signature
    continued: bool = False


@dataclass
class _Layer:
    rows: dict[Hashable, _Row] = field(default_factory=dict)
    density: tuple[int, float] | None = None

    @property
    def nbytes(self) -> int:
        return sum(row.mask.nbytes for row in self.rows.values())

    @property
    def recorded(self) -> bool:
        return bool(self.rows) and all(row.mask.passes[0] for row in self.rows.values())

    def measured_density(self) -> float:
        """Active share over all rows; asked only when memory is short, because it synchronises."""
        age = sum(row.mask.passes[0] for row in self.rows.values())
        if self.density is None or self.density[0] != age:
            active = sum(int(row.mask.active_tiles()) for row in self.rows.values())
            self.density = age, active / sum(row.mask.total_tiles for row in self.rows.values())
        return self.density[1]


class MaskTable:
    """Skip masks by layer and conditioning row; one mask per row, allocated once in its final size.

    Opened by a `Session` and closed with it. There is no reset: a new run is a new table, so that a cached model
    or guider can never start with the last prompt's decisions. A row seen for the first time starts with every
    tile active. Lookups are locked, because ComfyUI's multi-GPU workers share the table.

    Args:
        limit_bytes: above it the layers that skip least are let go and stay dense. The layer that is being
            recorded may exceed it for the length of its call: how little it skips is known only afterwards.
        allocating: context manager to hold around allocations (see `Workspace`).
        kept: masks of the run that this one continues; a new row that finds its mask there goes on with it.
        note: takes a sentence for the user.
    """

    def __init__(self, limit_bytes: int, allocating: Callable[[], AbstractContextManager] = nullcontext,
                 kept: KeptMasks | None = None, note: Callable[[str], None] = lambda text: None):
        self.limit_bytes = limit_bytes
        self.continued_rows = 0
        self.grown = False
        self._kept = kept
        self._note = note
        self._allocating = allocating
        self._layers: dict[LayerKey, _Layer] = {}
        self._dense: list[LayerKey] = []
        self._lock = threading.Lock()
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all masks."""
        return sum(layer.nbytes for layer in self._layers.values())

    def nbytes_on(self, device: torch.device) -> int:
        """Bytes of the masks on one device."""
        with self._lock:
            return sum(layer.nbytes for key, layer in self._layers.items() if key.device == device)

    @property
    def dense_layers(self) -> list[str]:
        """Names of the layers let go for lack of memory, in the order of their blocks."""
        return list(dict.fromkeys(key.name for key in sorted(self._dense, key=lambda k: (len(k.name), k.name))))

    def is_dense(self, key: LayerKey) -> bool:
        """Whether the layer was let go for lack of memory."""
        return key in self._dense

    def masks(self, key: LayerKey, rows: Sequence[Hashable], heads: int, seqlen: int, head_dim: int,
              dtype: torch.dtype) -> list[SkipMask]:
        """One mask of batch 1 for each row of a call. A row whose shape or dtype has changed starts fresh.

        Raises:
            torch.OutOfMemoryError: no memory for a new mask; the rows that have one keep it.
        """
        signature = Signature(heads, seqlen, head_dim, dtype)
        found = []
        with self._lock:
            layer = self._layers.setdefault(key, _Layer())
            for name in rows:
                row = layer.rows.get(name)
                if row is not None and row.signature != signature:
                    self._note(f"starting fresh: layer {key.name}: {row.signature} became {signature}")
                    del layer.rows[name]
                    row = None
                if row is None:
                    row = layer.rows[name] = self._new_row(key, name, signature)
                    layer.density = None
                    self.grown = True
                found.append(row.mask)
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return found

    def _new_row(self, key: LayerKey, name: Hashable, signature: Signature) -> _Row:
        mask, problem = self._kept.take(key, name, signature) if self._kept is not None else (None, "")
        if problem:
            self._note(f"continue_from {problem}")
        with self._allocating():
            if mask is None:
                return _Row(SkipMask.full(1, signature.heads, signature.seqlen, device=key.device), signature)
            self.continued_rows += 1
            return _Row(mask if mask.device == key.device else mask.to(key.device), signature, continued=True)

    def fresh_rows(self, key: LayerKey, rows: Sequence[Hashable]) -> list[SkipMask]:
        """Masks, among those of a call, that do not come from the run before: these need a warm-up."""
        with self._lock:  # another device's call may just have let go of this layer
            held = self._layers.get(key, _Layer()).rows
            return [held[name].mask for name in rows if name in held and not held[name].continued]

    def keep(self) -> KeptMasks:
        """Every mask that has recorded, for the run that continues this one. Synchronises; the table is closed next."""
        kept = KeptMasks()
        with self._lock:
            for key, layer in self._layers.items():
                for name, row in layer.rows.items():
                    if row.mask.passes[0]:
                        kept.add(key, name, row.signature, row.mask)
        return kept

    def enforce_limit(self) -> list[str]:
        """Let go of the layers that skip least until the masks fit the limit; their names."""
        let_go = []
        with self._lock:
            self.grown = False
            while self.nbytes > self.limit_bytes:
                recorded = [(key, layer) for key, layer in self._layers.items() if layer.recorded]
                if not recorded:
                    break
                key, _ = max(recorded, key=lambda item: item[1].measured_density())
                del self._layers[key]
                self._dense.append(key)
                let_go.append(key.name)
        return let_go

    def all_masks(self) -> dict[LayerKey, dict[Hashable, SkipMask]]:
        """A view of the state for reports and tests."""
        return {key: {name: row.mask for name, row in layer.rows.items()} for key, layer in self._layers.items()}

    def forget(self, key: LayerKey) -> None:
        """Drop a layer's masks, after a call on them failed half-way."""
        with self._lock:
            self._layers.pop(key, None)

    def close(self) -> None:
        """Let go of every mask."""
        with self._lock:
            self._layers.clear()
            if self._kept is not None:
                self._kept.clear()
