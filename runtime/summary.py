"""What a run tells: a line after each step, a summary at the end, and what to try."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from .reasons import CROSS_ATTENTION, DENSE_FASTER, NOT_VIDEO, Reason
from .rules import Rule
from .schedule import NO_STEP_LEFT, RECORDS_ONLY
from .timing import TimeSaved
from .words import ENGLISH, Words, words

MB = 2**20

LITTLE_SKIPPED = 0.05
SMALL_SHARE = 0.2
"""Of a run's time that attention takes when dense: with less, even skipping half of it saves less than a tenth."""
MUCH_DENSE = 0.1
"""Of the self-attention over the video's tokens that stays dense, for a faster dense attention to be worth a word."""
SLOWER = 0.98
"""Speed-ups below are a slowdown; from here to 1 the clock's noise could be all of it."""

_OTHER = (CROSS_ATTENTION, NOT_VIDEO)
"""Reasons of calls that are no self-attention over the video."""

NOT_REACHED = "no attention call reached LiteAttention"


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
        mask_bytes: memory of the skip masks.
        phase: what the step was by plan.
        saved: attention time of the run up to here, or None where it is not timed.
    """

    step: int
    total_steps: int
    skipped: float | None
    skipped_so_far: float
    mask_bytes: int
    phase: str
    saved: TimeSaved | None = None

    def lines(self, language: str = ENGLISH) -> list[str]:
        """Two short ones: the node shows hardly three, of 40 characters."""
        say = words(language)
        now = say("no attention ran") if self.skipped is None else say("skipped {share}", share=f"{self.skipped:.0%}")
        lines = [say("step {step}/{steps} ({phase}): {now}, run {share}", step=self.step, steps=self.total_steps,
                     phase=say.told(self.phase), now=now, share=f"{self.skipped_so_far:.0%}")]
        if self.saved is not None:
            seconds = self.saved.dense_seconds - self.saved.sparse_seconds
            amount = f"{abs(seconds):.1f}"
            lines.append(say("attention: {seconds} s saved so far", seconds=amount) if seconds >= 0 else
                         say("attention: {seconds} s more so far", seconds=amount))
        return lines


@dataclass(frozen=True)
class RunSummary:
    """One finished run.

    Attributes:
        plan: what the settings meant for this run. rule: which rule chose the tiles.
        steps_done, total_steps: of the run.
        forward_passes: model evaluations that called attention.
        sparse_calls: attention calls that the sparse kernel served. dense_calls: the others, by reason.
        tiles_computed, tiles_total: of all self-attention over the video's tokens; dense_tiles: of its dense calls.
        skipped_per_step: 0..1; None where no such call ran.
        layers: skipped share of each layer in each step, of its sparse calls; None where there was none.
        mask_bytes: peak memory of the skip masks. carried_bytes: main memory of their copies for later nodes.
        tokens: of the longest sparse call.
        backend: which backend ran where. fallback: display name of the attention that computes dense calls.
        break_evens: for each shape of call, the share of active tiles above which the fallback attention is faster,
            and where that is known from (`BreakEven`).
        saved: attention time, or None where it was not timed.
        seconds: from the first evaluation to the end of the last step; None if no step has finished.
        settings: the node's settings.
        unreached: why no self-attention reached the pack and what to do; "" where one did.
        notes: events worth a line. advice: what to try.
        environment: versions, device and model, for bug reports.
    """

    plan: str
    rule: str
    steps_done: int
    total_steps: int
    forward_passes: int
    sparse_calls: int
    dense_calls: dict[Reason, int]
    tiles_computed: int
    tiles_total: int
    dense_tiles: int
    skipped_per_step: list[float | None]
    layers: dict[str, list[float | None]]
    mask_bytes: int
    tokens: int
    backend: str = ""
    fallback: str = ""
    carried_bytes: int = 0
    break_evens: list[dict] = field(default_factory=list)
    saved: TimeSaved | None = None
    seconds: float | None = None
    settings: dict = field(default_factory=dict)
    unreached: str = ""
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def off(cls, why: str) -> RunSummary:
        """Of no run at all, for where one was to be shown."""
        return cls(plan="", rule="", steps_done=0, total_steps=0, forward_passes=0, sparse_calls=0, dense_calls={},
                   tiles_computed=0, tiles_total=0, dense_tiles=0, skipped_per_step=[], layers={}, mask_bytes=0,
                   tokens=0, unreached=why)

    @property
    def skipped(self) -> float:
        """Share of the run's self-attention tiles that were not computed, 0..1."""
        return 1 - self.tiles_computed / self.tiles_total if self.tiles_total else 0.0

    @property
    def dense_share(self) -> float:
        """Share of the run's self-attention tiles that the fallback attention computed, 0..1."""
        return self.dense_tiles / self.tiles_total if self.tiles_total else 0.0

    @property
    def dense_run_seconds(self) -> float | None:
        """What `seconds` would be with every self-attention call dense; None where attention was not timed."""
        if self.seconds is None or self.saved is None:
            return None
        return self.seconds + self.saved.dense_seconds - self.saved.sparse_seconds

    @property
    def speed_up(self) -> float | None:
        """Time of a dense run over that of this one; None where attention was not timed."""
        dense = self.dense_run_seconds
        return dense / self.seconds if dense and self.seconds and self.sparse_calls else None

    @property
    def slower(self) -> bool:
        """Whether the run was timed and took longer than a dense one would have."""
        return self.speed_up is not None and self.speed_up < SLOWER

    @property
    def attention_share(self) -> float | None:
        """Share of `dense_run_seconds` that self-attention over the video's tokens takes, 0..1."""
        whole = self.dense_run_seconds
        return min(1.0, self.saved.dense_seconds / whole) if whole else None

    def to_dict(self) -> dict:
        """Plain values for JSON. "expected" are the reasons in "dense_calls" that are normal or the user's settings,
        "not_self_attention" those of other attention, which is never sparse."""
        dense_calls = {reason.text: count for reason, count in self.dense_calls.items()}
        layers = {name: [None if share is None else round(share, 4) for share in shares]
                  for name, shares in self.layers.items()}
        return {**asdict(replace(self, dense_calls={})), "dense_calls": dense_calls, "layers": layers,
                "expected": sorted(reason.text for reason in self.dense_calls if reason.expected),
                "not_self_attention": sorted(reason.text for reason in self.dense_calls if reason in _OTHER),
                "headline": self.headline(), "skipped": self.skipped, "speed_up": self.speed_up, "slower": self.slower,
                "dense_run_seconds": self.dense_run_seconds, "attention_share": self.attention_share}

    def text(self) -> str:
        """One readable line, for the log."""
        return "; ".join(self.lines())

    def report(self, language: str = ENGLISH) -> str:
        """The lines, the range of the layers, and versions; for **LiteAttention Report**."""
        say, lines = words(language), self.lines(language)
        last = {name: known[-1] for name, shares in self.layers.items()
                if (known := [share for share in shares if share is not None])}
        if last:
            least, most = min(last, key=lambda n: last[n]), max(last, key=lambda n: last[n])
            lines.append(say("layers when last run: {least} ({first}) to {most} ({second}) skipped", first=least,
                             least=f"{last[least]:.0%}", second=most, most=f"{last[most]:.0%}"))
        if self.environment:
            lines.append(", ".join(f"{name} {value}" for name, value in self.environment.items()))
        return "\n".join(lines)

    def headline(self, language: str = ENGLISH) -> str:
        """On, or why not; how much was skipped, how fast, and the first thing to change."""
        say, advice, why = words(language), self.advice[:1], self.main_reason()
        if self.sparse_calls:
            said = self._on(say)
        elif self.unreached or why is None:
            said, advice = say("off: {why}", why=say.told(self.unreached or NOT_REACHED)), []
        else:
            said = say("off: {why}", why=say.told(why))
        return say("{said}; try: {advice}", said=said, advice=say.told(advice[0])) if advice else said

    def _on(self, say: Words) -> str:
        share = f"{self.skipped:.1%}"
        if self.speed_up is None:
            return say("on: {share} of attention skipped", share=share)
        return say("on: {share} of attention skipped, slower: {speed}x of dense" if self.slower else
                   "on: {share} of attention skipped, {speed}x as fast as dense", share=share,
                   speed=f"{self.speed_up:.2f}")

    def main_reason(self) -> Reason | None:
        """The reason of most dense calls: first of those that are not normal, then of self-attention."""
        return max(self.dense_calls, default=None,
                   key=lambda reason: (not reason.expected, reason not in _OTHER, self.dense_calls[reason]))

    def lines(self, language: str = ENGLISH) -> list[str]:
        """The headline, then short lines in a fixed order: further advice, time, quality, calls, notes, masks."""
        say, notes = words(language), [words(language).told(note) for note in self.notes]
        lines = [self.headline(language)]
        if not self.sparse_calls and not self.dense_calls:
            return lines + notes
        lines += [say("try: {advice}", advice=say.told(advice)) for advice in self.advice[1:]]
        if self.speed_up is not None:
            lines.append(say("time: {seconds} s, dense about {dense} s, of which attention {share}",
                             seconds=f"{self.seconds:.1f}", dense=f"{self.dense_run_seconds:.1f}",
                             share=f"{self.attention_share:.0%}"))
        lines.append(say("quality: {rule}, {plan}", rule=self.rule, plan=say.listed(self.plan)))
        lines.append(self._calls(say))
        if DENSE_FASTER in self.dense_calls:
            known = dict.fromkeys(say("{share} ({source})", share=f"{known['density']:.0%}",
                                      source=say.told(known["source"])) for known in self.break_evens)
            lines.append(say("dense attention is faster above {shares} of the tiles", shares=say(", ").join(known)))
        size = bytes_text(self.mask_bytes)
        masks = say("masks: {size}, {backend}", size=size, backend=say.listed(self.backend)) if self.backend else \
            say("masks: {size}", size=size)
        return [*lines, *notes, masks]

    def _calls(self, say: Words) -> str:
        """Self-attention over the video first: the others are never sparse."""
        reasons = sorted(self.dense_calls.items(), key=lambda item: -item[1])
        dense = [(reason, count) for reason, count in reasons if reason not in _OTHER]
        parts = [say("self-attention: {sparse} of {total} calls sparse", sparse=self.sparse_calls,
                     total=self.sparse_calls + sum(count for _, count in dense))]
        if dense:
            parts.append(say("dense: {reasons}", reasons=say(", ").join(
                say("{count} {reason}", count=count, reason=say.told(reason)) for reason, count in dense)))
        if CROSS_ATTENTION in self.dense_calls:
            parts.append(say("{count} cross-attention calls", count=self.dense_calls[CROSS_ATTENTION]))
        if NOT_VIDEO in self.dense_calls:
            parts.append(say("{count} calls over other tokens", count=self.dense_calls[NOT_VIDEO]))
        by = say(" (dense by {attention})", attention=say.listed(self.fallback, " and ")) \
            if self.fallback and self.dense_calls else ""
        return say(", ").join(parts) + by


def advise(summary: RunSummary, rule: Rule, faster_dense: str = "") -> list[str]:
    """What to try, most urgent first; empty if there is nothing to improve or the run did not finish.

    Args:
        faster_dense: what to say where much stays dense and a faster dense attention is there.
    """
    if summary.steps_done < summary.total_steps:
        return []
    found = []
    bolder = rule.bolder() or "this video has little to skip; fewer steps save more"
    if summary.slower:
        found.append("bypass the node here, it costs more time than it saves; longer and larger videos gain more")
    declined = {reason: count for reason, count in summary.dense_calls.items() if not reason.expected}
    if sum(declined.values()) > summary.sparse_calls:
        main = max(declined, key=lambda reason: declined[reason])
        found.append(bolder if main == DENSE_FASTER else main.hint)
    if NO_STEP_LEFT in summary.plan:
        found.append("lower warmup_steps or dense_end_steps: no step was left to skip in")
    elif (summary.sparse_calls and not summary.slower and summary.skipped < LITTLE_SKIPPED
          and RECORDS_ONLY not in summary.plan):
        found.append(bolder)
    share = summary.attention_share
    if share is not None and share < SMALL_SHARE:
        found.append(f"attention is only {share:.0%} of this run's time without LiteAttention; see what takes the rest "
                     "(weights that move in and out of a full GPU, few tokens)")
    if faster_dense and summary.dense_share > MUCH_DENSE and (share is None or share >= SMALL_SHARE):
        found.append(faster_dense)
    return [sentence for sentence in dict.fromkeys(found) if sentence]
