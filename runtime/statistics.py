"""What a run did: calls taken and left, tiles computed, per step and per layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Reopened

MB = 2**20
COUNTERS = 32
"""Counters per layer: thousands of programs that add to one address would wait for each other."""
LAYERS_PER_BLOCK = 64
"""Layers that get their counters in one allocation. Blocks never move: a call may be adding to one."""


def bytes_text(nbytes: int) -> str:
    """"7.5 MB", "14.1 KB"; units of 2^20 and 2^10 bytes."""
    return f"{nbytes / MB:.1f} MB" if nbytes >= MB // 10 else f"{nbytes / 1024:.1f} KB"


@dataclass
class _Layer:
    """A layer's counters [COUNTERS] and its calls of the open step.

    Attributes:
        name: for people; layers that differ in device, network or context window share one.
        tiles, fresh: of those calls; fresh ones belong to rows whose mask had not recorded yet.
        density: active share when last seen with a recorded mask.
    """

    counters: Tensor
    name: str
    tiles: int = 0
    fresh: int = 0
    density: float | None = None

    def close_step(self, computed: int) -> None:
        # Fresh rows compute every tile, so what is left of the count belongs to the others.
        if self.tiles > self.fresh:
            self.density = (computed - self.fresh) / (self.tiles - self.fresh)
        self.tiles = self.fresh = 0


class Statistics:
    """Counts of a run. Computed tiles are summed on their device, by layer, and read once per step.

    Locked, because several devices may report at once.

    Args:
        allocating: context manager to hold around allocations (see `Workspace`).

    Attributes:
        tiles_computed, tiles_total: of all self-attention calls over the video's tokens, in closed steps.
        taken_computed, taken_total: of those that skip-mask attention served.
        seconds, dense_seconds: in all of them, and in those left; 0 unless calls are timed. dense_tiles: of those left.
        sampled_calls, sampled_tiles, sampled_seconds: dense calls made for their time alone, in no other count.
        per_step: step -> [computed, total]; per_layer: layer -> step -> the same of the calls taken.
    """

    def __init__(self, allocating: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self.left: Counter[str] = Counter()
        self.taken = 0
        self.tokens = 0
        self.seconds = 0.0
        self.tiles_computed = 0
        self.tiles_total = 0
        self.taken_computed = 0
        self.taken_total = 0
        self.dense_seconds = 0.0
        self.dense_tiles = 0
        self.sampled_calls = 0
        self.sampled_tiles = 0
        self.sampled_seconds = 0.0
        self.refreshed = 0
        self.came_back = 0
        self.per_step: dict[int, list[int]] = {}
        self.per_layer: dict[str, dict[int, list[int]]] = {}
        self._evaluations: set[Hashable] = set()
        self._counters: dict[torch.device, list[Tensor]] = {}
        self._layers: dict[torch.device, dict[Hashable, _Layer]] = {}
        self._reopened: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()
        self._allocating = allocating
        self._open = [0, 0]

    @property
    def evaluations(self) -> int:
        """Model evaluations in which attention was called."""
        return len(self._evaluations)

    def counters(self, layer: Hashable, device: torch.device) -> Tensor:
        """int64 [COUNTERS] on `device`, to which calls of this layer add the tiles they computed."""
        with self._lock:
            layers = self._layers.setdefault(device, {})
            if layer not in layers:
                blocks = self._counters.setdefault(device, [])
                with torch.inference_mode(False):
                    if len(layers) == len(blocks) * LAYERS_PER_BLOCK:
                        with self._allocating():
                            blocks.append(torch.zeros(LAYERS_PER_BLOCK, COUNTERS, dtype=torch.int64, device=device))
                    layers[layer] = _Layer(blocks[-1][len(layers) % LAYERS_PER_BLOCK],
                                           getattr(layer, "profile_name", str(layer)))
            return layers[layer].counters

    def count_layer(self, layer: Hashable, device: torch.device, tiles: int, fresh: int) -> None:
        """A call whose computed tiles are in `counters`; `fresh` of its tiles are of rows that recorded first."""
        with self._lock:
            entry = self._layers[device][layer]
            entry.tiles += tiles
            entry.fresh += fresh

    def count_reopened(self, reopened: Sequence[Reopened], device: torch.device) -> None:
        """Query tiles that were opened before a call and have been judged in it. Adds up on the device."""
        if not reopened:
            return
        with self._lock:
            if device not in self._reopened:
                with torch.inference_mode(False), self._allocating():
                    self._reopened[device] = torch.zeros(2, dtype=torch.int64, device=device)
            for query_tiles in reopened:
                self._reopened[device] += torch.stack((query_tiles.dropped(), query_tiles.came_back()))

    def density(self, layer: Hashable, device: torch.device) -> float | None:
        """Active share of the layer's tiles in the last closed step that ran on its mask, or None before that."""
        entry = self._layers.get(device, {}).get(layer)
        return entry.density if entry is not None else None

    def count_taken(self, evaluation: Hashable, tiles: int, tokens: int, seconds: float) -> None:
        """A call that skip-mask attention served; its computed tiles are in `counters`."""
        with self._lock:
            self._evaluations.add(evaluation)
            self.taken += 1
            self.tokens = max(self.tokens, tokens)
            self.seconds += seconds
            self._open[1] += tiles

    def count_left(self, evaluation: Hashable, reason: str, dense_tiles: int, seconds: float) -> None:
        """A call that went to the previous attention; `dense_tiles` > 0 if it was over the video's tokens."""
        with self._lock:
            self._evaluations.add(evaluation)
            self.left[reason] += 1
            self._open[0] += dense_tiles
            self._open[1] += dense_tiles
            if dense_tiles:
                self.seconds += seconds
                self.dense_seconds += seconds
                self.dense_tiles += dense_tiles

    def count_sample(self, tiles: int, seconds: float) -> None:
        """A dense call that was made for its time alone; 0 seconds unless calls are timed here."""
        with self._lock:
            self.sampled_calls += 1
            self.sampled_tiles += tiles
            self.sampled_seconds += seconds

    def end_step(self, step: int) -> float | None:
        """Close the books of a step (counted from 0) and give its skipped share. Synchronises once per device."""
        with self._lock:
            computed, total = self._open
            for device, blocks in self._counters.items():
                if not blocks:
                    continue
                sums = [torch.cat(blocks).sum(1)]
                zero = [*blocks]
                if device in self._reopened:
                    sums.append(self._reopened[device])
                    zero.append(self._reopened[device])
                counted = torch.cat(sums).tolist()
                for counters in zero:
                    counters.zero_()
                if len(sums) > 1:
                    self.came_back += counted.pop()
                    self.refreshed += counted.pop()
                computed += sum(counted)
                self.taken_computed += sum(counted)
                for layer, tiles in zip(self._layers[device].values(), counted, strict=False):
                    if layer.tiles:
                        self.taken_total += layer.tiles
                        _add(self.per_layer.setdefault(layer.name, {}), step, tiles, layer.tiles)
                    layer.close_step(tiles)
            self._open = [0, 0]
            _add(self.per_step, step, computed, total)
            self.tiles_computed += computed
            self.tiles_total += total
            return 1 - computed / total if total else None

    def skipped_so_far(self) -> float:
        """Skipped share of the run up to the last closed step."""
        return 1 - self.tiles_computed / self.tiles_total if self.tiles_total else 0.0

    def shares(self) -> list[float | None]:
        """Skipped share of each step."""
        return _shares(self.per_step, max(self.per_step, default=-1) + 1)

    def layer_shares(self) -> dict[str, list[float | None]]:
        """Skipped share of each layer in each step, of the calls that were taken; None where none was."""
        steps = max(self.per_step, default=-1) + 1
        return {name: _shares(books, steps) for name, books in self.per_layer.items()}

    def close(self) -> None:
        """Let go of device memory."""
        self._counters.clear()
        self._layers.clear()
        self._reopened.clear()


def _add(books: dict[int, list[int]], step: int, computed: int, total: int) -> None:
    entry = books.setdefault(step, [0, 0])
    entry[0] += computed
    entry[1] += total


def _shares(books: dict[int, list[int]], steps: int) -> list[float | None]:
    return [1 - computed / total if total else None
            for computed, total in (books.get(step, (0, 0)) for step in range(steps))]
