"""Whether the skip masks of a run fit, known before the first of them is made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from ..kernels import mask_nbytes
from . import policy
from .config import STATE_MB_MIN, BlockSet
from .state import MB, LayerKey, MaskTable
from .statistics import bytes_text

if TYPE_CHECKING:
    from .evaluation import LayerId

log = logging.getLogger("LiteAttention")

FreeMemory = Callable[[torch.device], "int | None"]


class Room:
    """Forecasts the masks of each kind of block when its first layer calls, and declines those that would not fit.

    A forecast is for the conditioning rows of one call; rows that come later get their own. A row that was declined
    stays with the previous attention for the rest of the run, as does a layer whose masks could not be allocated: a
    device that is asked for memory it does not have empties its caches each time.

    Args:
        masks: of the run; its limit (`max_state_mb`) is the most that they take.
        dense_blocks: these get no masks.
        free_memory: device -> free bytes, or None where that is not known; nothing is declined there.
        note: takes a sentence for the user.
    """

    def __init__(self, masks: MaskTable, dense_blocks: BlockSet, free_memory: FreeMemory | None,
                 note: Callable[[str], None]):
        self._masks = masks
        self._dense_blocks = dense_blocks
        self._free_memory = free_memory
        self._note = note
        self._admitted: dict[Hashable, set[Hashable]] = {}
        self._declined: dict[Hashable, set[Hashable]] = {}
        self._forecast: dict[torch.device, int] = {}
        self._starved: set[LayerKey] = set()
        self._announced: set[Hashable] = set()
        self._lock = threading.Lock()

    def reason(self, key: LayerKey, layer: LayerId, rows: Sequence[Hashable], heads: int, seqlen: int) -> str | None:
        """Why these rows get no masks in this layer, or None."""
        if key in self._starved:
            return policy.NO_MEMORY
        site = key.model, key.device, layer.kind, key.ordinal, key.window
        with self._lock:
            admitted, declined = self._admitted.setdefault(site, set()), self._declined.setdefault(site, set())
            if not declined.isdisjoint(rows):
                return policy.NO_ROOM
            new = set(rows) - admitted
            if not new:
                return None
            layers = self._layers(layer)
            per_row = layers * mask_nbytes(1, heads, seqlen, seqlen)
            forecast = self._forecast.get(key.device, 0) + len(new) * per_row
            needed = max(0, min(forecast, self._masks.limit_bytes) - self._masks.nbytes_on(key.device))
            free = self._ask(key.device)
            fits = free is None or needed <= free
            (admitted if fits else declined).update(new)
            if fits:
                self._forecast[key.device] = forecast
            announced = (layer.kind, heads, seqlen) in self._announced
            self._announced.add((layer.kind, heads, seqlen))
        if not announced:
            log.info("LiteAttention: skip masks take up to %s per prompt (%d x %s, %d heads x %d tokens)",
                     bytes_text(per_row), layers, layer.kind, heads, seqlen)
        if fits:
            return None
        advice = "free some memory"
        if free >= STATE_MB_MIN * MB:
            advice = f"set max_state_mb to {free // MB} or less: layers that skip least stay dense then"
        self._note(f"the skip masks need {bytes_text(needed)} more, {key.device} has {bytes_text(free)} free; "
                   f"attention stays as it was. Make the video shorter or smaller, or {advice}.")
        return policy.NO_ROOM

    def starve(self, key: LayerKey) -> None:
        """A mask of this layer could not be allocated; it is not tried again."""
        self._starved.add(key)

    def _layers(self, layer: LayerId) -> int:
        """How many layers of this kind get masks, as far as the model tells."""
        if layer.total is None:
            return 1
        return sum(not self._dense_blocks.holds(index, layer.total) for index in range(layer.total))

    def _ask(self, device: torch.device) -> int | None:
        """Free bytes, or None."""
        if self._free_memory is None:
            return None
        try:
            return self._free_memory(device)
        except Exception as error:
            log.debug("LiteAttention: free memory of %s is not known: %s", device, str(error))
            return None
