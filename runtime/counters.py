"""What a run computed: calls by kind and reason, tiles by step and layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import LayerKey
from .reasons import Reason

COUNTERS = 32
"""Counters per layer: thousands of programs that add to one address would wait for each other."""
LAYERS_PER_BLOCK = 64
"""Layers that get their counters in one allocation. Blocks never move: a call may be adding to one."""


@dataclass
class _Layer:
    """A layer's counters [COUNTERS] and its calls of the open step.

    Attributes:
        tiles, fresh: of those calls; fresh tiles belong to rows whose mask had not recorded yet.
        density: active share when last seen with a recorded mask.
    """

    counters: Tensor
    tiles: int = 0
    fresh: int = 0
    density: float | None = None

    def close_step(self, computed: int) -> None:
        # Fresh rows compute every tile, so the rest of the count belongs to the others.
        if self.tiles > self.fresh:
            self.density = (computed - self.fresh) / (self.tiles - self.fresh)
        self.tiles = self.fresh = 0


class Counters:
    """Counts of a run. Computed tiles are summed on their device, by layer, and read once per step.

    Locked, because several devices may report at once.

    Args:
        allocating: context manager to hold around allocations (see `Workspace`).

    Attributes:
        sparse: sparse calls. dense: dense calls by reason. dense_by: by the attention that computed them.
        tiles_computed, tiles_total: of all self-attention calls over the video's tokens, in closed steps.
        sparse_computed, sparse_total: of the sparse calls among them. dense_tiles: of the dense calls among them.
        per_step: step -> [computed, total]; per_layer: display name -> step -> the same of the sparse calls.
    """

    def __init__(self, allocating: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self.dense: Counter[Reason] = Counter()
        self.dense_by: Counter[str] = Counter()
        self.sparse = 0
        self.tokens = 0
        self.tiles_computed = 0
        self.tiles_total = 0
        self.sparse_computed = 0
        self.sparse_total = 0
        self.dense_tiles = 0
        self.per_step: dict[int, list[int]] = {}
        self.per_layer: dict[str, dict[int, list[int]]] = {}
        self._passes: set[Hashable] = set()
        self._counters: dict[torch.device, list[Tensor]] = {}
        self._layers: dict[torch.device, dict[LayerKey, _Layer]] = {}
        self._lock = threading.Lock()
        self._allocating = allocating
        self._open = [0, 0]

    @property
    def forward_passes(self) -> int:
        """Forward passes in which attention was called."""
        return len(self._passes)

    def on_device(self, key: LayerKey) -> Tensor:
        """int64 [COUNTERS] on the layer's device, to which its calls add the tiles they computed."""
        with self._lock:
            layers = self._layers.setdefault(key.device, {})
            if key not in layers:
                blocks = self._counters.get(key.device, [])
                with torch.inference_mode(False):
                    if len(layers) == len(blocks) * LAYERS_PER_BLOCK:
                        with self._allocating():
                            new = torch.zeros(LAYERS_PER_BLOCK, COUNTERS, dtype=torch.int64, device=key.device)
                        self._counters[key.device] = blocks = [*blocks, new]
                    layers[key] = _Layer(blocks[-1][len(layers) % LAYERS_PER_BLOCK])
            return layers[key].counters

    def densities(self) -> dict[LayerKey, float]:
        """Active share of each layer's tiles in the last closed step that ran on its mask."""
        return {key: layer.density for layers in list(self._layers.values()) for key, layer in list(layers.items())
                if layer.density is not None}

    def add_sparse(self, forward_pass: Hashable, key: LayerKey, tiles: int, fresh: int, tokens: int,
                   calls: int = 1) -> None:
        """A sparse call whose computed tiles are in `on_device`; `fresh` of its tiles belong to rows without a mask.

        Args:
            calls: 0 for the further parts of an attention that is called in parts.
        """
        with self._lock:
            self._passes.add(forward_pass)
            self.sparse += calls
            self.tokens = max(self.tokens, tokens)
            layer = self._layers[key.device][key]
            layer.tiles += tiles
            layer.fresh += fresh
            self._open[1] += tiles

    def add_dense(self, forward_pass: Hashable, reason: Reason, tiles: int, dense_by: str = "", calls: int = 1) -> None:
        """A dense call, computed by the attention of that name; `tiles` > 0 if it was a self-attention over the video's
        tokens. `calls`: as in `add_sparse`."""
        with self._lock:
            self._passes.add(forward_pass)
            if calls:
                self.dense[reason] += calls
                self.dense_by[dense_by] += calls
            self._open[0] += tiles
            self._open[1] += tiles
            self.dense_tiles += tiles

    def end_step(self, step: int) -> float | None:
        """Sum the counters of step `step` (from 0) and return its skipped share. Synchronises once per device."""
        with self._lock:
            computed, total = self._open
            for device, blocks in self._counters.items():
                counted = torch.cat(blocks).sum(1).tolist()
                for counters in blocks:
                    counters.zero_()
                computed += sum(counted)
                self.sparse_computed += sum(counted)
                for (key, layer), tiles in zip(self._layers[device].items(), counted, strict=False):
                    if layer.tiles:
                        self.sparse_total += layer.tiles
                        _add(self.per_layer.setdefault(key.name, {}), step, tiles, layer.tiles)
                    layer.close_step(tiles)
            self._open = [0, 0]
            _add(self.per_step, step, computed, total)
            self.tiles_computed += computed
            self.tiles_total += total
            return 1 - computed / total if total else None

    def dense_by_text(self) -> str:
        """Display names of the attentions that computed dense calls, the most used first."""
        return " and ".join(name for name, _ in self.dense_by.most_common() if name)

    def skipped_so_far(self) -> float:
        """Skipped share of the run up to the last closed step."""
        return 1 - self.tiles_computed / self.tiles_total if self.tiles_total else 0.0

    def shares(self, steps: int) -> list[float | None]:
        """Skipped share of each of the first `steps` steps."""
        return _shares(self.per_step, steps)

    def layer_shares(self, steps: int) -> dict[str, list[float | None]]:
        """Skipped share of each layer in each step, of its sparse calls; None where there was none."""
        return {name: _shares(sums, steps) for name, sums in self.per_layer.items()}

    def close(self) -> None:
        """Free device memory."""
        self._counters.clear()
        self._layers.clear()


def _add(sums: dict[int, list[int]], step: int, computed: int, total: int) -> None:
    entry = sums.setdefault(step, [0, 0])
    entry[0] += computed
    entry[1] += total


def _shares(sums: dict[int, list[int]], steps: int) -> list[float | None]:
    return [1 - computed / total if total else None
            for computed, total in (sums.get(step, (0, 0)) for step in range(steps))]
