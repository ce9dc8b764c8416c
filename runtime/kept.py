"""Masks that outlive their run because a later one continues it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..kernels import SkipMask

if TYPE_CHECKING:
    from .state import LayerKey

NO_RUN = ("the run to continue did not happen in this prompt (its result may come from ComfyUI's cache, or another run "
          "has continued it already)")
NOT_FINISHED = "the run to continue did not finish"
SEVERAL = "several runs of that node happened in this prompt, and which one to continue is not certain"
NOT_ASKED = "the run to continue kept no masks, because its node did not know of this one; they are kept from now on"
NOTHING = "the run to continue has recorded no masks"
LOST = "the masks of the run to continue could not be kept"
NO_MATCH = "has no mask for some layers or prompts of this run; those warm up as usual"


class RowName(NamedTuple):
    """A batch row of a run: (identity of its conditioning, the conditioning's number in the guider's list, row in its
    chunk). Another run with the same prompts has other identities, but the same roles."""

    uuid: Hashable
    number: int
    row: int

    @property
    def role(self) -> Hashable:
        return self.number, self.row


class Signature(NamedTuple):
    """What has to stay the same for a mask to go on within a run."""

    heads: int
    seqlen: int
    head_dim: int
    dtype: object

    @property
    def shape(self) -> tuple[int, int, int]:
        """What has to stay the same from run to run, also between networks of different precision."""
        return self[:3]

    def __str__(self) -> str:
        return (f"{self.heads} heads x {self.seqlen} tokens x {self.head_dim} "
                f"{str(self.dtype).removeprefix('torch.')}")


@dataclass(frozen=True)
class _Kept:
    model: Hashable
    row: Hashable
    signature: Signature
    mask: SkipMask


class KeptMasks:
    """The masks of a finished run, in main memory: the next model has to find room on the device. Each is taken once.

    A mask is found again by where it belongs (block, ordinal, context window) and by the role of its row. The network
    may be another one (Wan 2.2 has two with the same layers). Where that leaves a choice, the same network and the same
    conditioning win; where they do not settle it, nothing is taken: a mask that is not certain is worse than a warm-up.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, list[_Kept]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the masks that have not been taken."""
        return sum(kept.mask.nbytes for all_kept in self._kept.values() for kept in all_kept)

    def add(self, key: LayerKey, row: Hashable, signature: Signature, mask: SkipMask) -> None:
        """Keep a mask; one on another device is copied."""
        mask = mask if mask.device.type == "cpu" else mask.to("cpu")
        self._kept.setdefault(_place(key, row), []).append(_Kept(key.model, row, signature, mask))

    def take(self, key: LayerKey, row: Hashable, signature: Signature) -> tuple[SkipMask | None, str]:
        """(the mask of this row, ""), or (None, why there is none)."""
        there = self._kept.get(_place(key, row), [])
        fitting = [kept for kept in there if kept.signature.shape == signature.shape]
        if there and not fitting:
            return None, f"has masks for {there[0].signature}, this run needs {signature}; starting fresh"
        for preferred in ([kept for kept in fitting if kept.row == row],
                          [kept for kept in fitting if kept.model == key.model]):
            if len(fitting) > 1 and preferred:
                fitting = [kept for kept in fitting if any(kept is other for other in preferred)] or fitting
        if len(fitting) != 1:
            return None, NO_MATCH
        there.remove(fitting[0])
        return fitting[0].mask, ""

    def clear(self) -> None:
        """Let go of the masks that nobody has taken."""
        self._kept.clear()


def _place(key: LayerKey, row: Hashable) -> Hashable:
    return key.name, key.ordinal, key.window, getattr(row, "role", row)
