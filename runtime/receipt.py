"""What a run tells: a line after each step, and its account at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from . import policy
from .advice import EXPECTED
from .savings import Saved
from .statistics import bytes_text

NODE_LINE = ";\n"
"""Between the lines of a text on the node: the frontend's newer nodes show a line break as a space."""


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
        saved: attention time of the run up to here, or None while there is none to tell.
    """

    step: int
    total_steps: int
    skipped: float | None
    skipped_so_far: float
    state_bytes: int
    phase: str
    saved: Saved | None = None

    def text(self) -> str:
        """Two short lines for the node: it shows hardly three, of 40 characters."""
        now = "no attention ran" if self.skipped is None else f"skipped {self.skipped:.0%}"
        saved = f"{self.saved.short_text()}, " if self.saved is not None else ""
        return (f"step {self.step}/{self.total_steps} ({self.phase.removesuffix(' step')}): {now}, "
                f"run {self.skipped_so_far:.0%}{NODE_LINE}{saved}masks {bytes_text(self.state_bytes)}")


@dataclass(frozen=True)
class Receipt:
    """The account of one finished run.

    Attributes:
        taken: attention calls that ran through skip-mask attention.
        left: calls that went to the previous attention, by reason. taken + the sum of left = all calls seen.
        evaluations: model evaluations in which attention was called.
        tiles_computed, tiles_total: of all self-attention calls over the video's tokens, dense ones included.
        dense_tiles: of them, those that the previous attention computed.
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
        layers: skipped share of each layer in each step, of the calls taken; None where none was.
        saved: attention time, or None where none was to save.
        seconds: from the first evaluation to the end of the last step; None if no step has finished, or if the time
            says nothing (a calibrating run).
        previous: the attention that computes what is left, by name.
        settings: the node's settings.
        advice: what to try.
        environment: versions, device and model, for bug reports.
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
    layers: dict[str, list[float | None]] = field(default_factory=dict)
    saved: Saved | None = None
    seconds: float | None = None
    previous: str = ""
    dense_tiles: int = 0
    settings: dict = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def skipped(self) -> float:
        """Share of the run's self-attention tiles that were not computed, 0..1."""
        return 1 - self.tiles_computed / self.tiles_total if self.tiles_total else 0.0

    @property
    def dense_share(self) -> float:
        """Share of the run's self-attention tiles that the previous attention computed, 0..1."""
        return self.dense_tiles / self.tiles_total if self.tiles_total else 0.0

    @property
    def wrong_drop_rate(self) -> float | None:
        """Share of the tiles judged anew that mattered after all, or None if none was."""
        return self.came_back / self.refreshed if self.refreshed else None

    @property
    def dense_run_seconds(self) -> float | None:
        """What `seconds` would be with every self-attention call dense; None where attention was not timed."""
        if self.seconds is None or self.saved is None or self.saved.dense_seconds is None:
            return None
        return self.seconds + self.saved.dense_seconds - self.saved.lite_seconds

    @property
    def attention_share(self) -> float | None:
        """Share of `dense_run_seconds` that self-attention over the video's tokens takes, 0..1."""
        whole = self.dense_run_seconds
        return min(1.0, self.saved.dense_seconds / whole) if whole else None

    def to_dict(self) -> dict:
        """Plain values for JSON. "expected" are the reasons in `left` that are normal or the user's own settings."""
        layers = {name: [None if share is None else round(share, 4) for share in shares]
                  for name, shares in self.layers.items()}
        expected = sorted(EXPECTED.intersection(self.left))
        return {**asdict(self), "layers": layers, "expected": expected, "skipped": self.skipped,
                "wrong_drop_rate": self.wrong_drop_rate,
                "dense_run_seconds": self.dense_run_seconds, "attention_share": self.attention_share}

    def text(self) -> str:
        """One readable line, for the log."""
        return "; ".join(self.lines())

    def node_text(self) -> str:
        """The same for the node, line by line."""
        return NODE_LINE.join(self.lines())

    def time_text(self) -> str | None:
        """How long the run took, and would have taken without; None where attention was not timed."""
        dense = self.dense_run_seconds
        if dense is None or not self.taken:
            return None
        return (f"sampling: {self.seconds:.1f} s instead of about {dense:.1f} s ({dense / self.seconds:.2f}x), "
                f"attention {self.attention_share:.0%} of that")

    def lines(self) -> list[str]:
        """What ran, what it saved, what to try, what was left and why; the most important first, because the node
        shows hardly three lines before one has to scroll."""
        if not self.taken and not self.left:
            return ["no attention call reached LiteAttention: a node after it replaced the attention; put "
                    "LiteAttention last before the sampler", *self.notes]
        left = ", ".join(f"{n} {reason}" for reason, n in sorted(self.left.items(), key=lambda item: -item[1]))
        parts = [f"skipped {self.skipped:.1%} of the attention tiles"]
        parts += filter(None, [self.time_text()])
        if self.saved is not None and self.taken:
            parts.append(self.saved.text())
        if self.advice:
            parts.append(f"to try: {', '.join(self.advice)}")
        parts += [f"{self.taken} of {self.taken + sum(self.left.values())} attention calls taken"
                  + (f", left as they were: {left}" if left else "")
                  + (f" (by {self.previous})" if left and self.previous else ""),
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
        return parts + self.notes
