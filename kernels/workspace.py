"""Scratch memory that outlives a call, so that a steady render allocates nothing but its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .mask import MustKeep, pack_bits

_TABLE_LIMIT = 4096
"""Distinct small tables kept per workspace. A render needs two per layer and way of batching its rows; evicting one
that is still in use would cost an upload, and with it a synchronisation, at every call."""


class Workspace:
    """Growing scratch buffers and small constant tables, per device. Not shared between streams of one device.

    Args:
        allocating: gives a context manager to hold around every allocation that outlives the call (ComfyUI's
            recorder of block allocations has to be paused for those).
    """

    def __init__(self, allocating: Callable[[], AbstractContextManager] = nullcontext):
        self._allocating = allocating
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._tables: dict[tuple, Tensor] = {}

    def buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised flat buffer of at least `numel` elements, the same one at every call."""
        key = (name, device)
        held = self._buffers.get(key)
        if held is None or held.numel() < numel:
            # Freed first: the old and the new buffer need not exist together.
            self._buffers.pop(key, None)
            del held
            held = self._buffers[key] = self._allocate(numel, dtype, device)
        return held

    @contextmanager
    def borrowed(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """The same for one call alone: calls of other threads at the same time get memory of their own."""
        key = (name, device)
        held = self._buffers.pop(key, None)
        if held is None or held.numel() < numel:
            held = None
            held = self._allocate(numel, dtype, device)
        try:
            yield held
        finally:
            self._buffers[key] = held

    def _allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        with self._allocating(), torch.inference_mode(False):
            return torch.empty(numel, dtype=dtype, device=device)

    def mask_table(self, entries: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
        """int64 [B, 2]: for each batch entry the address of its mask words and whether it visits backwards."""
        return self._table((device, entries), lambda: torch.tensor(entries, dtype=torch.int64, device=device))

    def must_words(self, must_keep: MustKeep, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
        """int32 [QT, W]: the must-keep tiles as mask words."""
        return self._table(
            (device, must_keep, seqlen_q, seqlen_k),
            lambda: pack_bits(must_keep.tile_mask(seqlen_q, seqlen_k)).contiguous().to(device),
        )

    def in_order(self, n: int, device: torch.device) -> Tensor:
        """int64 [n]: 0, 1, …"""
        return self._table((device, n), lambda: torch.arange(n, device=device))

    def _table(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        held = self._tables.get(key)
        if held is None:
            if len(self._tables) >= _TABLE_LIMIT:
                self._tables.pop(next(iter(self._tables)))
            with self._allocating(), torch.inference_mode(False):
                held = self._tables[key] = make()
        return held

    @property
    def nbytes(self) -> int:
        """Bytes held by buffers and tables."""
        return sum(t.numel() * t.element_size() for held in (self._buffers, self._tables) for t in held.values())

    def close(self) -> None:
        """Free everything."""
        self._buffers.clear()
        self._tables.clear()
