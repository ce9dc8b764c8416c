"""What to try after a run, from what it has counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import policy
from .config import THRESHOLD_MAX, THRESHOLD_MIN, LiteAttentionConfig
from .schedule import Phase

if TYPE_CHECKING:
    from .receipt import Receipt

LITTLE_SKIPPED = 0.05
MANY_CAME_BACK = 0.05
"""Of the tiles that `refresh_every` has judged anew. Both are rules of thumb, chosen and not measured."""
ENOUGH_REFRESHED = 100
"""Fewer tiles say nothing about a share of 5 %."""
SMALL_SHARE = 0.2
"""Of a run's time that attention takes when dense: with less, even skipping half of it saves less than a tenth."""
MUCH_LEFT = 0.1
"""Of the self-attention over the video's tokens that stays dense, for a faster dense attention to be worth a word."""
THRESHOLD_STEP = 2.0

EXPECTED = {policy.CROSS_ATTENTION, policy.NOT_VIDEO, policy.DENSE_BLOCK, Phase.WARMUP.value, Phase.END.value}
"""Reasons that are normal or the user's own settings."""

HINTS = {
    policy.NO_BACKEND: "install what the note about the device names",
    policy.NO_LAYER: "this model does not number its blocks and is not supported yet",
    policy.NO_LAYOUT: "how this model lays out its tokens is not known; it is not supported yet",
    policy.MOVING_WINDOWS: "choose a context schedule whose windows stay (standard_static or batched)",
    policy.NO_ROOM: "make the video shorter or smaller, or lower max_state_mb",
    policy.NO_MEMORY: "make the video shorter or smaller, or lower max_state_mb",
    policy.OVER_STATE_LIMIT: "raise max_state_mb if memory allows",
    policy.KERNEL_FAILED: "the video is correct; please report the note about the kernel",
    policy.NOT_IN_PROFILE: "make a profile for this model",
    policy.PROFILE_SIZE: "make a profile for this model",
}
"""By the reason that most calls were left for."""


def advise(receipt: Receipt, config: LiteAttentionConfig, profile: bool, faster_dense: str = "") -> list[str]:
    """Sentences, most urgent first; empty if there is nothing to improve or the run did not finish.

    Args:
        profile: the run had a profile, which takes the place of threshold and error_budget.
        faster_dense: what to say where much stays dense and a faster dense attention is there.
    """
    if receipt.steps_done < receipt.total_steps:
        return []
    found = []
    declined = {reason: count for reason, count in receipt.left.items() if reason not in EXPECTED}
    if sum(declined.values()) > receipt.taken:
        main = max(declined, key=lambda reason: declined[reason])
        if main.startswith("fewer than"):
            found.append("the video is short or small: more frames or pixels, or a lower min_tokens to try it anyway")
        elif main == policy.DENSE_FASTER:
            found.append(_bolder(config, profile))
        elif main in HINTS:
            found.append(HINTS[main])
    # A refresh that says "too bold" and a share that says "too careful" would contradict each other.
    if receipt.refreshed >= ENOUGH_REFRESHED and (receipt.wrong_drop_rate or 0) > MANY_CAME_BACK:
        found.append(_more_careful(config, profile))
    elif receipt.taken and receipt.skipped < LITTLE_SKIPPED:
        warm = receipt.left.get(Phase.WARMUP.value, 0) + receipt.left.get(Phase.END.value, 0)
        if not any(receipt.skipped_per_step):
            found.append("no step skipped anything: " + ("lower warmup_steps or dense_end_steps" if warm
                         else _bolder(config, profile)))
        else:
            found.append(_bolder(config, profile))
    share = receipt.attention_share
    if share is not None and share < SMALL_SHARE:
        found.append(f"attention is only {share:.0%} of this run's time without LiteAttention; see what takes the rest "
                     "(weights that move in and out of a full GPU, few tokens)")
    if faster_dense and receipt.dense_share > MUCH_LEFT and (share is None or share >= SMALL_SHARE):
        found.append(faster_dense)
    return list(dict.fromkeys(found))


def _bolder(config: LiteAttentionConfig, profile: bool) -> str:
    if profile:
        return "a profile made for a larger error skips more"
    if config.error_budget:
        return f"raise error_budget (now {config.error_budget:g}) to skip more, and look at the video"
    higher = min(THRESHOLD_MAX, config.threshold + THRESHOLD_STEP)
    if higher == config.threshold:
        return "this video has little to skip"
    return f"raise threshold to {higher:g} (now {config.threshold:g}) to skip more, and look at the video"


def _more_careful(config: LiteAttentionConfig, profile: bool) -> str:
    if profile:
        return "much of what was skipped came back: a profile made for a smaller error is safer"
    if config.error_budget:
        return f"much of what was skipped came back: lower error_budget (now {config.error_budget:g})"
    lower = max(THRESHOLD_MIN, config.threshold - THRESHOLD_STEP)
    return f"much of what was skipped came back: lower threshold to {lower:g} (now {config.threshold:g})"
