"""What a run did: calls taken and left, tiles computed, per step and per layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..kernels import Reopened
from . import policy

MB = 2**20
COUNTERS = 32
"""Counters per layer: thousands of programs that add to one address would wait for each other."""
LAYERS_PER_BLOCK = 64
"""Layers that get their counters in one allocation. Blocks never move: a call may be adding to one."""


def bytes_text(nbytes: int) -> str:
    """"7.5 MB", "14.1 KB"; units of 2^20 and 2^10 bytes."""
    return f"{nbytes / MB:.1f} MB" if nbytes >= MB // 10 else f"{nbytes / 1024:.1f} KB"


@dataclass(frozen=True)
class StepReport:
    """One finished step.

    Attributes:
        step, total_steps: counted from 1.
        skipped: share of this step's self-attention tiles that were not computed, 0..1; None if no eligible call
            ran (a step cache answered it).
        skipped_so_far: the same for the run up to here.
        state_bytes: memory of the skip masks.
        phase: what the step was by plan.
    """

    step: int
    total_steps: int
    skipped: float | None
    skipped_so_far: float
    state_bytes: int
    phase: str

    def text(self) -> str:
        """One line for the node."""
        now = "no attention ran" if self.skipped is None else f"skipped {self.skipped:.0%}"
        return (f"step {self.step}/{self.total_steps}: {now}, run {self.skipped_so_far:.0%}, "
                f"state {bytes_text(self.state_bytes)} ({self.phase})")


@dataclass(frozen=True)
class Receipt:
    """The account of one finished run.

    Attributes:
        taken: attention calls that ran through skip-mask attention.
        left: calls that went to the previous attention, by reason. taken + the sum of left = all calls seen.
        evaluations: model evaluations in which attention was called.
        tiles_computed, tiles_total: of all self-attention calls over the video's tokens, dense ones included.
        skipped_per_step: share per step, None where no such call ran.
        attention_seconds: time inside those self-attention calls, taken and left; None unless details are logged.
        state_bytes: peak memory of the skip masks.
        dense_layers: layers left dense because the masks would have exceeded max_state_mb.
        break_evens: for each shape of call, the share of active tiles above which the previous attention is faster,
            and where that is known from (`BreakEven`); empty without never_slower.
        plan: what the settings meant for this run.
        rule: which rule chose the tiles.
        refreshed: inactive tiles that `refresh_every` opened to be judged anew; came_back: those of them that stayed.
        kept_bytes: main memory of the masks that a later run will continue from.
        notes: things that happened once and are worth a line.
    """

    plan: str
    steps_done: int
    total_steps: int
    evaluations: int
    taken: int
    left: dict[str, int]
    tiles_computed: int
    tiles_total: int
    skipped_per_step: list[float | None]
    attention_seconds: float | None
    state_bytes: int
    tokens: int
    backend: str
    dense_layers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    break_evens: list[dict] = field(default_factory=list)
    rule: str = ""
    refreshed: int = 0
    came_back: int = 0
    kept_bytes: int = 0

    @property
    def skipped(self) -> float:
        """Share of the run's self-attention tiles that were not computed, 0..1."""
        return 1 - self.tiles_computed / self.tiles_total if self.tiles_total else 0.0

    @property
    def wrong_drop_rate(self) -> float | None:
        """Share of the tiles judged anew that mattered after all, or None if none was."""
        return self.came_back / self.refreshed if self.refreshed else None

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {**asdict(self), "skipped": self.skipped, "wrong_drop_rate": self.wrong_drop_rate}

    def text(self) -> str:
        """One readable line: what ran, what was left and why."""
        if not self.taken and not self.left:
            return ("no attention call reached LiteAttention: a node after it replaced the attention; "
                    "put LiteAttention last before the sampler")
        left = ", ".join(f"{n} {reason}" for reason, n in sorted(self.left.items(), key=lambda item: -item[1]))
        parts = [f"skipped {self.skipped:.1%} of the attention tiles",
                 f"{self.taken} of {self.taken + sum(self.left.values())} attention calls taken"
                 + (f", left as they were: {left}" if left else ""),
                 *filter(None, (self.plan, self.rule)), f"state {bytes_text(self.state_bytes)}", self.backend]
        if self.refreshed:
            parts.append(f"refresh: {self.wrong_drop_rate:.1%} of {self.refreshed} skipped tiles came back")
        if self.kept_bytes:
            parts.append(f"masks kept for continue_from: {bytes_text(self.kept_bytes)} of main memory")
        if policy.DENSE_FASTER in self.left:
            known = dict.fromkeys(f"{known['density']:.0%} ({known['source']})" for known in self.break_evens)
            parts.append(f"dense attention is faster above {', '.join(known)} of the tiles")
        if self.attention_seconds is not None:
            parts.append(f"self-attention took {self.attention_seconds:.2f} s")
        if self.dense_layers:
            parts.append(f"left dense to stay within max_state_mb: {', '.join(self.dense_layers)}")
        return "; ".join([*parts, *self.notes])


@dataclass
class _Layer:
    """A layer's counters [COUNTERS] and its calls of the open step.

    Attributes:
        tiles, fresh: of those calls; fresh ones belong to rows whose mask had not recorded yet.
        density: active share when last seen with a recorded mask.
    """

    counters: Tensor
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
    """

    def __init__(self, allocating: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self.left: Counter[str] = Counter()
        self.taken = 0
        self.tokens = 0
        self.seconds = 0.0
        self.tiles_computed = 0
        self.tiles_total = 0
        self.refreshed = 0
        self.came_back = 0
        self.per_step: dict[int, list[int]] = {}
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
                    layers[layer] = _Layer(blocks[-1][len(layers) % LAYERS_PER_BLOCK])
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
                for layer, tiles in zip(self._layers[device].values(), counted, strict=False):
                    layer.close_step(tiles)
            self._open = [0, 0]
            entry = self.per_step.setdefault(step, [0, 0])
            entry[0] += computed
            entry[1] += total
            self.tiles_computed += computed
            self.tiles_total += total
            return 1 - computed / total if total else None

    def skipped_so_far(self) -> float:
        """Skipped share of the run up to the last closed step."""
        return 1 - self.tiles_computed / self.tiles_total if self.tiles_total else 0.0

    def shares(self) -> list[float | None]:
        """Skipped share of each step."""
        last = max(self.per_step, default=-1)
        books = [self.per_step.get(step, [0, 0]) for step in range(last + 1)]
        return [1 - computed / total if total else None for computed, total in books]

    def close(self) -> None:
        """Let go of device memory."""
        self._counters.clear()
        self._layers.clear()
        self._reopened.clear()
