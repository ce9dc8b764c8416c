"""One sampling run: its settings, clocks, masks and accounts, made at its start and closed at its end."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace

import torch

from ..kernels import Workspace, precision_choice, resolve_backend
from .advice import advise
from .config import LiteAttentionConfig, parse_blocks
from .dispatch import BreakEvens, Dispatcher
from .evaluation import Evaluation
from .kept import LOST, NO_RUN, NOT_ASKED, NOT_FINISHED, NOTHING, SEVERAL, KeptMasks
from .policy import VideoTokens
from .profile import Profile
from .receipt import Receipt, StepReport
from .room import FreeMemory, Room
from .savings import Saved, saved
from .schedule import Phase, StepPlan
from .snapshot import MaskChoice, MaskPicture, mask_pictures
from .state import MB, LayerKey, MaskTable
from .statistics import Statistics

log = logging.getLogger("LiteAttention")


class RunHandle:
    """What the node hands to later nodes: the account of the last finished run and, from its end until another run
    continues it, its masks, if that is wanted. They are let go when they are taken, when the next run of this handle
    starts, and with the handle.

    Attributes:
        wanted: whether something will continue the runs of this handle.
        wanted_pictures: which masks to keep as pictures, or None.
        pictures: of the masks of the last finished run, where they were wanted.
    """

    def __init__(self) -> None:
        self.receipt: Receipt | None = None
        self.wanted = False
        self.wanted_pictures: MaskChoice | None = None
        self.pictures: list[MaskPicture] = []
        self._kept: KeptMasks | None = None
        self._prompt: Hashable = None
        self._several = False
        self._why = NO_RUN

    @property
    def kept_bytes(self) -> int:
        """Main memory of the masks that are held."""
        return 0 if self._kept is None else self._kept.nbytes

    def start(self, prompt: Hashable = None) -> None:
        """A run starts: what the one before has kept goes.

        Args:
            prompt: identity of the prompt that the run belongs to; only runs of the same one can continue it.
        """
        # Outside a server, where prompts have no identity, the last run is the one to continue.
        again = prompt is not None and prompt == self._prompt
        self._several = again and (self._several or self._kept is not None)
        self._kept, self._prompt, self._why = None, prompt, SEVERAL if self._several else NOT_FINISHED
        self.pictures = []

    def keep(self, session: Session, wanted: bool) -> None:
        """The run of `session` has finished and is about to be closed; its masks stay if they are wanted."""
        if not self._several:
            self._kept, self._why = session.keep_masks() if wanted else (None, NOT_ASKED)

    def picture(self, session: Session, choice: MaskChoice | None) -> None:
        """Keep pictures of the masks of `session`, which is about to be closed."""
        self.pictures = mask_pictures(session.masks.all_masks(), choice, session.layout) if choice is not None else []

    def take(self, prompt: Hashable = None) -> tuple[KeptMasks | None, str]:
        """(the masks, ""), or (None, why there are none). Either way the handle has none any more."""
        kept, why = (self._kept, self._why) if prompt == self._prompt else (None, NO_RUN)
        self._kept, self._why = None, SEVERAL if self._several else NO_RUN
        return kept, why


class Session:
    """State and policy of one sampling run, made at its start and closed in its `finally`.

    Two clocks: masks age by the recording passes of their own row (one per model evaluation); the phase moves with
    the sampler's steps. Second-order samplers evaluate the model more often than they step, step caches less.

    Args:
        config: the node's settings.
        total_steps: steps of this run.
        on_step: called with the report of each step.
        allocating: gives a context manager to hold around allocations that outlive a call.
        break_evens: what earlier runs with the same previous attention have timed, and where this one adds. None
            does without `never_slower`.
        kept: masks of the run that this one continues.
        profile: takes the place of the settings that choose tiles (threshold, error_budget, pool_skipped).
        free_memory: free bytes of a device, or None where that is not known; masks that would not fit are not made.
        previous: the attention that computes what is left, by name.
        faster_dense: a sentence that names a faster one to put in its place, where there is one.
    """

    tells_speed = True
    """Whether the time of a run says how fast its settings are."""

    def __init__(self, config: LiteAttentionConfig, total_steps: int, *,
                 on_step: Callable[[StepReport], None] | None = None,
                 allocating: Callable[[], AbstractContextManager] = nullcontext,
                 break_evens: BreakEvens | None = None, kept: KeptMasks | None = None,
                 profile: Profile | None = None, free_memory: FreeMemory | None = None, previous: str = "",
                 faster_dense: str = ""):
        # A profile drops each tile once, where it may: what is opened again would stay.
        self.config = config if profile is None else replace(config, refresh_every=0)
        self.profile = profile
        self.plan = StepPlan(total_steps, config.warmup_steps, config.dense_end_steps)
        self.dense_blocks = parse_blocks(config.dense_blocks)
        self.continuing = kept is not None
        self.masks = MaskTable(config.max_state_mb * MB, allocating, kept, self.note)
        self.room = Room(self.masks, self.dense_blocks, free_memory, self.note)
        self.statistics = Statistics(allocating)
        self.step = 0
        self.layout: tuple[int | VideoTokens, int] | None = None
        self.failed = False
        self.dispatcher = Dispatcher(break_evens if config.never_slower else None, self.note)
        self._previous, self._faster_dense = previous, faster_dense
        self._began: float | None = None
        self._seconds: float | None = None
        self._on_step = on_step
        self._allocating = allocating
        self._workspaces: dict[torch.device, Workspace] = {}
        self._backends: dict[torch.device, str | None] = {}
        # Of each layer, the last step that took thresholds of the profile, and the progress of the one before it.
        self._profiled: dict[LayerKey, tuple[int, float]] = {}
        self._int8_failed = False
        self._stand_in_failed = False
        self._kept_bytes = 0
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._evaluation_numbers = itertools.count()
        self._receipt: Receipt | None = None
        if config.refresh_every and profile is not None:
            self.note("refresh_every is not used with a profile")

    def evaluation(self, *, model: Hashable, rows: Sequence[Hashable] | None, latent_tokens: int | None,
                   window: Hashable = None, leave: str | None = None, frame_tokens: int | None = None,
                   kind: type[Evaluation] = Evaluation) -> Evaluation:
        """The context of one forward pass of a model.

        Args:
            model: identity of the network.
            rows: one stable name for each batch row (which conditioning, which latent), or None if unknown.
            latent_tokens: tokens that the latent makes, or None if unknown; a sequence may hold more.
            window: identity of the context window, or None.
            leave: reason to leave every call of this pass to the previous attention.
            frame_tokens: tokens of one latent frame, or None if unknown or if the model does not go frame by frame.
            kind: what to make of it.
        """
        if self._began is None:  # not earlier: weights are loaded before the first evaluation
            self._began = time.perf_counter()
        self.layout = (latent_tokens, frame_tokens) if latent_tokens is not None and frame_tokens else None
        return kind(self, next(self._evaluation_numbers), model, rows, latent_tokens, window, leave)

    def phase(self) -> Phase:
        """The phase of the current step."""
        return self.plan.phase(self.step)

    def end_step(self, step: int) -> StepReport:
        """The sampler has finished `step` (counted from 0)."""
        phase = self.phase()
        if phase in (Phase.WARMUP, Phase.RECORD) and self.masks.continued_rows:
            phase = Phase.SPARSE
        number, self.step = self.step, max(self.step, step + 1)  # the run goes on, whatever happens to its books
        skipped = self.statistics.end_step(number)
        self.dispatcher.end_step()
        if self._began is not None:
            self._seconds = time.perf_counter() - self._began - self.statistics.sampled_seconds
        report = StepReport(number + 1, self.plan.total_steps, skipped, self.statistics.skipped_so_far(),
                            self.masks.nbytes, phase.value, self._saved())
        if self._on_step is not None:
            self._on_step(report)
        return report

    def backend(self, device: torch.device) -> str | None:
        """The backend for `device`, or None where calls are better left to the previous attention.

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
            if name is not None and not choice.pool_skipped and self.pool_skipped:
                self._stand_in_failed = True
                self.note(f"pool_skipped is off on {device}. {reason}")
        except Exception as error:
            # A wrong environment variable, a driver that answers with an error: no reason to lose a render.
            name, reason = None, str(error)
        if name is None:
            self.note(f"attention stays as it was on {device}. {reason}")
        with self._lock:
            self._backends[device] = name
        return name

    def precision(self, device: torch.device, head_dim: int, dtype: torch.dtype, seqlen: int) -> str:
        """"full" or "int8": how the run computes q·k in calls of these shapes. INT8 that was asked for and is not taken
        is noted once."""
        if self._int8_failed:
            return "full"
        choice = precision_choice(device, head_dim, dtype, seqlen, self.config.precision, self.backend(device) or "")
        if choice.reason:
            self.note(f"precision is full, not int8. {choice.reason}")
        return choice.name

    @property
    def pool_skipped(self) -> bool:
        """Whether calls represent skipped tiles by stand-ins."""
        return (self.profile or self.config).pool_skipped and not self._stand_in_failed

    @property
    def progress(self) -> float:
        """How far the run is when the current step starts, 0..1 (see `Profile`)."""
        return self.step / self.plan.total_steps

    @property
    def rule(self) -> str:
        """Which rule chooses the tiles, for people."""
        return self.profile.describe() if self.profile is not None else self.config.rule

    def skip_test(self, key: LayerKey, seqlen_k: int) -> tuple[float, str]:
        """(threshold in log2, criterion) of a call of a layer over so many keys."""
        if self.profile is None:
            return self.config.call_threshold(seqlen_k), self.config.criterion
        return self._from_profile(key, seqlen_k)[0], self.profile.criterion

    def restarts(self, key: LayerKey) -> bool:
        """Whether a layer's masks start anew in this step, with every tile active."""
        return self.profile is not None and self._from_profile(key)[1]

    def _from_profile(self, key: LayerKey, seqlen_k: int | None = None) -> tuple[float, bool]:
        step, since = self._profiled.get(key, (-1, -1.0))
        if step != self.step:
            since = step / self.plan.total_steps if step >= 0 else -1.0
            self._profiled[key] = self.step, since
        return self.profile.at(key.profile_name, self.progress, since, seqlen_k)

    def do_without(self, precision: str, pool_skipped: bool) -> bool:
        """A call with these ran out of memory: do without the larger of what it adds, INT8 copies before stand-ins, for
        the rest of the run. False if there is nothing to do without."""
        if precision == "int8":
            self._int8_failed = True
            self.note("no memory for the INT8 copies of q and k; precision is full for the rest of this run")
        elif pool_skipped:
            self._stand_in_failed = True
            self.note("no memory for the stand-ins of skipped tiles; pool_skipped is off for the rest of this run")
        return precision == "int8" or pool_skipped

    def keep_masks(self) -> tuple[KeptMasks | None, str]:
        """(the masks, in main memory, for a run that continues this one, ""), or (None, why not). Never raises."""
        if self.failed:
            return None, LOST
        try:
            kept = self.masks.keep()
        except Exception as error:
            self.note(f"{LOST}. {type(error).__name__}: {str(error)[:200]}")
            return None, LOST
        self._kept_bytes = kept.nbytes
        return (kept, "") if self._kept_bytes else (None, NOTHING)

    def note(self, text: str) -> None:
        """Log a line once per run and keep it for the receipt."""
        with self._lock:
            if text in self._notes:
                return
            self._notes.append(text)
        log.warning("LiteAttention: %s", text)

    def workspace(self, device: torch.device) -> Workspace:
        """Scratch memory of this run on `device`."""
        with self._lock:
            return self._workspaces.setdefault(device, Workspace(self._allocating))

    def close(self) -> Receipt:
        """Free everything and give the run's account. Safe to call again."""
        if self._receipt is None:
            try:
                self.statistics.end_step(self.step)
            except Exception as error:
                # After an error on the device its counters cannot be read; the memory is freed all the same.
                log.warning("LiteAttention: the books of the last step are lost: %s", str(error))
            try:
                self._receipt = self._account()
            finally:
                self.masks.close()
                self.statistics.close()
                for workspace in self._workspaces.values():
                    workspace.close()
                self._workspaces.clear()
        return self._receipt

    def _saved(self) -> Saved | None:
        return saved(self.statistics, self.dispatcher) if self.tells_speed else None

    def _account(self) -> Receipt:
        statistics = self.statistics
        backends = [f"{name} backend on {device}" for device, name in self._backends.items() if name]
        receipt = Receipt(
            plan=self.plan.describe(self.masks.continued_rows > 0), rule=self.rule,
            steps_done=self.step, total_steps=self.plan.total_steps,
            evaluations=statistics.evaluations, taken=statistics.taken, left=dict(statistics.left),
            tiles_computed=statistics.tiles_computed, tiles_total=statistics.tiles_total,
            skipped_per_step=statistics.shares()[:max(self.step, 1)],
            attention_seconds=statistics.seconds if self.config.log_details else None,
            state_bytes=self.masks.peak_bytes, tokens=statistics.tokens,
            backend=", ".join(backends) or "no backend used",
            refreshed=statistics.refreshed, came_back=statistics.came_back, kept_bytes=self._kept_bytes,
            dense_layers=self.masks.dense_layers, break_evens=self.dispatcher.report(), notes=list(self._notes),
            layers={name: shares[:max(self.step, 1)] for name, shares in statistics.layer_shares().items()},
            saved=self._saved(), seconds=self._seconds if self.tells_speed else None, previous=self._previous,
            dense_tiles=statistics.dense_tiles,             settings=asdict(self.config))
        return replace(receipt, advice=advise(receipt, self.config, self.profile is not None, self._faster_dense))
