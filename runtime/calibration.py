"""Calibration: thresholds for each layer and part of a run that keep attention close to dense, from one sampling run.

`lanes.py` is the search. Here its lanes are measured: a call costs a dense attention and another lane more than usual.
The result is that of the bolder lane that is within its limit, so that the run goes where runs with the profile will.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import SkipMask, lite_attention, tiles
from . import policy
from .call import AttentionCall
from .config import LiteAttentionConfig
from .evaluation import Evaluation, LayerId
from .lanes import Lane, LayerCalibration
from .profile import ERROR_LIMIT, KNOTS_LIMIT, METRICS, Profile, ProfiledLayer
from .session import Session
from .state import LayerKey

STARTS = {"max": -6.0, "mass": -1.0}
"""The threshold to try first, log2; of "mass" for a single tile: it is divided among the key tiles."""
TARGET_MIN, TARGET_MAX = 1e-6, 0.5
_CHUNK = 4096


@dataclass(frozen=True)
class CalibrationTarget:
    """What no call may exceed: `error` in `metric`, of the worst batch row, with tiles chosen by `criterion`.

    Raises:
        ValueError: naming the input, its value and what is allowed.
    """

    error: float = 0.02
    metric: str = METRICS[0]
    criterion: str = "mass"

    def __post_init__(self) -> None:
        error = self.error
        if isinstance(error, bool) or not isinstance(error, (int, float)) or not TARGET_MIN <= error <= TARGET_MAX:
            raise ValueError(f"target_error is {error!r}; it is a number from {TARGET_MIN:g} to {TARGET_MAX:g}.")
        for name, allowed in (("metric", METRICS), ("criterion", tuple(STARTS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")


class ProfileHandle:
    """Holds a profile, or the place where a calibrating run will leave one.

    Attributes:
        profile: of the last finished run that could be calibrated, or the one that was loaded; None before.
        problem: why there is none.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = profile
        self.problem = "no sampling run of the calibrating model has finished yet"

    def set(self, profile: Profile | None, problem: str = "") -> None:
        """A run starts (no profile yet) or has finished."""
        self.profile, self.problem = profile, problem

    def get(self) -> Profile:
        """The profile.

        Raises:
            ValueError: there is none, and why.
        """
        if self.profile is None:
            raise ValueError(f"There is no profile: {self.problem}. Queue a sampler with the model output of "
                             "LiteAttention Calibrate, and let what needs the profile run after it (connect the "
                             "sampler's latent to samples of LiteAttention Save Profile).")
        return self.profile


def attention_error(out: Tensor, dense: Tensor, metric: str) -> Tensor:
    """Float32 scalar on their device: error of the worst batch row, over [B, ...] tensors, from float32 sums. Infinite
    where an output is not finite."""
    sums = out.new_zeros(3, out.shape[0], dtype=torch.float32)
    for o, d in zip(out.split(_CHUNK, 1), dense.split(_CHUNK, 1), strict=True):
        o, d = (x.flatten(1).float() for x in (o, d))
        if metric == "cosine":
            parts = (o * d).sum(1), o.square().sum(1), d.square().sum(1)
        elif metric == "relative L1":
            parts = (o - d).abs().sum(1), d.abs().sum(1), d.new_zeros(d.shape[0])
        else:
            parts = (o - d).square().sum(1), d.square().sum(1), d.new_zeros(d.shape[0])
        sums += torch.stack(parts)
    tiny = torch.finfo(torch.float32).tiny
    if metric == "cosine":
        errors = 1 - sums[0] / (sums[1].sqrt() * sums[2].sqrt()).clamp_min(tiny)
    else:
        errors = sums[0] / sums[1].clamp_min(tiny)
        errors = errors.sqrt() if metric == "relative L2" else errors
    return errors.clamp_min(0).nan_to_num(math.inf, math.inf).max()


class CalibrationSession(Session):
    """A session that calibrates. `config` says what is left, as in any run; its rule for choosing tiles is not used.

    Args:
        target: what no call may exceed.

    Attributes:
        calls: attention calls that were measured.
        extra: attention evaluations that they have added.
        most_extra: the most that one of them has added.
    """

    tells_speed = False

    def __init__(self, config: LiteAttentionConfig, total_steps: int, *, target: CalibrationTarget, **kwargs: Any):
        # A layer that is left to the attention before us cannot be calibrated.
        super().__init__(replace(config, never_slower=False, refresh_every=0, error_budget=0.0), total_steps, **kwargs)
        self.target = target
        self.layers: dict[str, LayerCalibration] = {}
        self.seqlen = 0
        self.calls = self.extra = self.most_extra = 0

    @property
    def rule(self) -> str:
        return f"calibrating to {self.target.metric} {self.target.error:g}, criterion {self.target.criterion}"

    def evaluation(self, **kwargs: Any) -> Evaluation:
        return super().evaluation(kind=CalibratingEvaluation, **kwargs)

    def layer(self, name: str, call: AttentionCall) -> LayerCalibration:
        """The calibration of a layer, opened with its first call."""
        if name not in self.layers:
            share = math.log2(tiles(call.seqlen_k)) if self.target.criterion == "mass" else 0.0
            self.layers[name] = LayerCalibration(call.heads, call.head_dim, self.target.error,
                                                 STARTS[self.target.criterion] - share)
        return self.layers[name]

    def count_measured(self, seqlen: int, evaluations: int) -> None:
        """A call over so many tokens has cost so many attention evaluations."""
        self.seqlen = max(self.seqlen, seqlen)
        self.calls += 1
        self.extra += evaluations - 1
        self.most_extra = max(self.most_extra, evaluations - 1)

    def calibrated(self, architecture: str) -> tuple[Profile | None, str]:
        """(the profile of the finished run, ""), or (None, why there is none)."""
        if self.failed:
            return None, "the kernel failed in the calibrating run; see the log"
        if self.step < self.plan.total_steps:
            return None, f"the calibrating run was stopped after {self.step} of {self.plan.total_steps} steps"
        found = [(name, layer, layer.finish()) for name, layer in self.layers.items()]
        if not found:
            return None, ("no attention call of the calibrating run was one that LiteAttention takes; its receipt says "
                          "why")
        total = self.plan.total_steps
        steps = sorted({step for _, _, lane in found for step in lane.errors})[:KNOTS_LIMIT]
        return Profile(
            architecture, tuple(ProfiledLayer(name, layer.heads, layer.head_dim) for name, layer, _ in found),
            tuple(step / total for step in steps), tuple(lane.row(steps) for _, _, lane in found),
            tuple(tuple(step in lane.restarts for step in steps) for _, _, lane in found),
            tuple(tuple(min(lane.errors.get(step, 0.0), ERROR_LIMIT) for step in steps) for _, _, lane in found),
            self.target.criterion, self.pool_skipped, self.target.error, self.target.metric, total, self.seqlen), ""


class CalibratingEvaluation(Evaluation):
    """A forward pass that measures every lane of every layer."""

    session: CalibrationSession

    def attend(self, call: AttentionCall, layer: LayerId | None, previous: Callable[[], Tensor],
               repeatable: bool = True) -> Tensor:
        self._previous = previous
        return super().attend(call, layer, previous, repeatable=False)

    def _attention(self, call: AttentionCall, key: LayerKey, masks: list[SkipMask], *_: Any) -> Tensor:
        """Every lane's attention; the result, in the kernel's layout. The session's masks become the steady lane's."""
        session = self.session
        layer = session.layer(key.profile_name, call)
        layer.begin(session.step, session.progress)
        dense = self._previous() if any(lane.skips for lane in layer.lanes) else None
        evaluations = 0 if dense is None else 1
        result = None
        for lane in layer.lanes:
            before = [lane.mask((key, id(mask)), mask) for mask in masks]
            out = self._record(call, key, lane, before, masks)
            evaluations += 1
            error = float(attention_error(call.restore(out), dense, session.target.metric)) if lane.skips else 0.0
            active, total = int(sum(mask.active_tiles() for mask in before)), sum(mask.total_tiles for mask in before)
            lane.measured(session.step, error, 1 - active / total)
            if result is None and error <= layer.limit(lane):
                result, computed = out, active
        if result is None:
            # The steady lane restarts: this call computes every tile.
            result, computed = out, total
            call.restore(result).copy_(dense)
        session.statistics.counters(key, key.device).view(-1)[:1].add_(computed)
        session.count_measured(call.seqlen_k, evaluations)
        for mask, steady in zip(masks, before, strict=True):
            mask.words.copy_(steady.words)
            mask.passes = [n + 1 for n in mask.passes]
        return result

    def _record(self, call: AttentionCall, key: LayerKey, lane: Lane, before: list[SkipMask],
                carried: list[SkipMask]) -> Tensor:
        """A lane's attention. What it records with its trial threshold is for its branch; itself it drops nothing."""
        session = self.session
        masks = [mask.clone() for mask in before]
        out = lite_attention(
            call.q, call.k, call.v, masks, heads=call.packed_heads, sm_scale=call.sm_scale, threshold=lane.trial,
            criterion=session.target.criterion, pool_skipped=session.pool_skipped,
            must_keep=policy.must_keep_tokens(call.seqlen_q, self.latent_tokens), precision=self._precision(call),
            backend=session.backend(key.device), workspace=session.workspace(key.device))
        lane.recorded.update({(key, id(mask)): new for mask, new in zip(carried, masks, strict=True)})
        return out
