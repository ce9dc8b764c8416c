"""The sparse kernel in one run: where it can run, what it does without, and the one place where it may fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import (
    MustKeep,
    SkipMask,
    UnsupportedAttention,
    Workspace,
    lite_attention,
    precision_choice,
    resolve_backend,
)
from .call import AttentionCall
from .config import LiteAttentionConfig
from .masks import LayerKey, MaskTable, Signature
from .notes import Notes
from .reasons import KERNEL_FAILED, NO_MEMORY, OUT_OF_MEMORY, UNSUPPORTED, Reason
from .rules import SkipTest


@dataclass(frozen=True)
class Plan:
    """How a call is computed.

    Attributes:
        rows: names of its batch entries. signature: of their masks. heads: those of the call.
        restart: the rows that were not carried over start anew, so that they see every tile in this call.
    """

    key: LayerKey
    rows: Sequence[Hashable]
    signature: Signature
    heads: range
    skip_test: SkipTest
    must_keep: MustKeep | None
    restart: bool


class SparseAttention:
    """Computes the sparse calls of one run.

    Args:
        masks: of the run.
        allocating: gives a context manager to hold around allocations that outlive a call.
    """

    def __init__(self, config: LiteAttentionConfig, masks: MaskTable, notes: Notes,
                 allocating: Callable[[], AbstractContextManager] = nullcontext):
        self.failed: Reason | None = None
        self._precision, self._pool_skipped = config.precision, config.pool_skipped
        self._masks = masks
        self._notes = notes
        self._allocating = allocating
        self._workspaces: dict[torch.device, Workspace] = {}
        self._backends: dict[torch.device, str | None] = {}
        self._starved: set[LayerKey] = set()
        self._lock = threading.Lock()

    def backend(self, device: torch.device) -> str | None:
        """The backend for `device`, or None where calls stay dense.

        On an accelerator without Triton the torch backend is not taken unless it was asked for by name: a fused
        dense attention is hard to beat by gathering. The reason is noted once, with the package to install.
        """
        with self._lock:
            if device in self._backends:
                return self._backends[device]
        try:
            choice = resolve_backend(device)
            name: str | None = choice.name
            if name == "torch" and device.type != "cpu" and not choice.asked:
                name = None
            reason = choice.reason
            if name is not None and not choice.pooled and self._pool_skipped:
                self._pool_skipped = False
                self._notes.add(f"pool_skipped is off on {device}. {reason}")
        except Exception as error:
            # A wrong environment variable, a driver that answers with an error: no reason to lose a render.
            name, reason = None, str(error)
        if name is None:
            self._notes.add(f"LiteAttention is off on {device}. {reason}")
        with self._lock:
            self._backends[device] = name
        return name

    def reason(self, key: LayerKey) -> Reason | None:
        """Why calls of this layer stay dense after what has happened in the run, or None."""
        return self.failed or (NO_MEMORY if key in self._starved else None)

    def precision(self, call: AttentionCall) -> str:
        """"full" or "int8": how a call computes q·k. INT8 that was asked for and is not taken is noted once."""
        device = call.q.device
        choice = precision_choice(device, call.head_dim, call.q.dtype, call.seqlen_k, self._precision,
                                  self.backend(device) or "")
        if choice.reason:
            self._notes.add(f"precision is full, not int8. {choice.reason}")
        return choice.name

    def compute(self, call: AttentionCall, plan: Plan, computed: Tensor) -> tuple[Tensor, int] | Reason:
        """(result in the layout that the caller wants, batch entries that recorded for the first time), or why there is
        none.

        Args:
            computed: see `lite_attention`.

        Raises:
            torch.OutOfMemoryError: the host knows what to unload.
        """
        try:
            masks = self._open(plan)
            if masks is None:
                return NO_MEMORY
            fresh = sum(not mask.passes[0] for mask in masks)
            return call.restore(self._attention(call, plan, masks, computed)), fresh
        except UnsupportedAttention as error:
            self._notes.add(f"the call stays dense: {error}", plan.key.name)
            return Reason(error.reason, UNSUPPORTED.meaning, hint=UNSUPPORTED.hint)
        except Exception as error:
            self._masks.forget(plan.key)
            if is_out_of_memory(error):
                raise
            return self.give_up(plan.key.name, error)

    def _open(self, plan: Plan) -> list[SkipMask] | None:
        """The masks of a call, or None where there is no memory for them: the layer stays dense."""
        try:
            rows = self._masks.open(plan.key, plan.rows, plan.signature)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows = None
        if rows is None:  # outside the handler, whose traceback would keep the masks that did fit
            self._notes.add("no memory for the skip mask; the layer stays dense", plan.key.name)
            # Not tried again: a device that is asked for memory it does not have empties its caches each time.
            self._starved.add(plan.key)
            self._masks.forget(plan.key)
            return None
        masks = [row.part(plan.heads) for row in rows]
        for row, mask in zip(rows, masks, strict=True):
            if plan.restart and not row.carried:
                mask.reset()
        return masks

    def _attention(self, call: AttentionCall, plan: Plan, masks: list[SkipMask], computed: Tensor) -> Tensor:
        device = plan.key.device
        while True:
            precision, pool_skipped = self.precision(call), self._pool_skipped
            try:
                return lite_attention(
                    call.q, call.k, call.v, masks, heads=call.packed_heads,
                    sm_scale=call.sm_scale, threshold=plan.skip_test.threshold, criterion=plan.skip_test.criterion,
                    pool_skipped=pool_skipped, must_keep=plan.must_keep, precision=precision,
                    backend=self.backend(device), workspace=self.workspace(device), computed=computed)
            except Exception as error:
                if not (is_out_of_memory(error) and self._do_without(precision, pool_skipped)):
                    raise

    def _do_without(self, precision: str, pool_skipped: bool) -> bool:
        """Out of memory: disable the largest optional buffer for the rest of the run, INT8 copies, then pooled keys.
        False if there is none."""
        if precision == "int8":
            self._precision = "full"
            self._notes.add("no memory for the INT8 copies of q and k; precision is full for the rest of this run")
        elif pool_skipped:
            self._pool_skipped = False
            self._notes.add("no memory for the pooled keys and values; pool_skipped is off for the rest of this run")
        return precision == "int8" or pool_skipped

    def give_up(self, layer: str, error: Exception) -> Reason:
        """Every further call of the run stays dense; the note says why."""
        self.failed = KERNEL_FAILED
        self._notes.add(f"the kernel failed and is not tried again in this run; attention stays dense. "
                        f"{type(error).__name__}: {str(error)[:300]}", layer)
        return KERNEL_FAILED

    def run_out(self) -> None:
        """Memory ran out in the kernel, and the host must not see the error: every further call stays dense."""
        self.failed = OUT_OF_MEMORY
        self._notes.add("memory ran out in the sparse kernel; attention stays dense for the rest of this run")

    def workspace(self, device: torch.device) -> Workspace:
        """Scratch memory of this run on `device`."""
        with self._lock:
            return self._workspaces.setdefault(device, Workspace(self._allocating))

    def describe(self) -> str:
        """Which backend ran where."""
        return ", ".join(f"{name} backend on {device}" for device, name in self._backends.items() if name)

    def close(self) -> None:
        """Free scratch memory."""
        for workspace in self._workspaces.values():
            workspace.close()
        self._workspaces.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the device's (or the CPU allocator's) out-of-memory error."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
