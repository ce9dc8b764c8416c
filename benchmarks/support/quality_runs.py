"""Runs of the quality lab: a case under one setting, and what is recorded of it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from .quality_candidates import CANDIDATES, PARTS, Simulated
from .quality_cases import MODELS, Case
from .quality_methods import simulate
from .quality_metrics import ssim
from .sol import sol_attention, sol_routes

LONGER = 3
"""Times the steps of a case, in a second dense run that it is compared with."""


@dataclass(frozen=True)
class Setting:
    """One point of one curve.

    Attributes:
        method: its name, as in tables and plots.
        kind: "budget" or "threshold" (the node's rules, through a `SamplingRun`), "dense", "sol", "simulation" (of
            `quality_candidates`), "donor" (masks of another run).
        level: what moves along the curve: the budget, the log2 threshold, the number of steps, Sol-Attn's tau.
    """

    method: str
    kind: str
    level: float


@dataclass(frozen=True)
class AnyBudget:
    """The node's rule, also for budgets that it does not offer."""

    share: float

    @property
    def text(self) -> str:
        return f"budget {self.share:g}"

    def skip_test(self, layer: object, step: int, seqlen_k: int):
        from liteattention.kernels import tiles
        from liteattention.runtime.rules import SkipTest

        return SkipTest(math.log2(self.share / tiles(seqlen_k)), "mass")

    def bolder(self) -> None:
        return None


@lru_cache(maxsize=2)
def model(name: str, device: str):
    """A model of the lab, once a process."""
    from liteattention.benchmarks.demo_pipeline.wan import load_tiny_wan

    return load_tiny_wan(MODELS[name], device=torch.device(device))


def warmup(case: Case) -> int:
    """Evaluations at the start that compute everything, by the node's defaults; all methods get as many."""
    from liteattention.runtime import StepPlan

    return StepPlan(case.steps).dense_steps * (2 if case.sampler == "heun" else 1)


def sample(case: Case, device: str, on_evaluation: Callable | None = None, callback: Callable | None = None,
           steps: int | None = None, other: tuple[tuple[int, ...], int] | None = None) -> Tensor:
    """The latent [1, C, T, h, w] of a run on the CPU. `other`: prompt and seed in place of the case's."""
    from liteattention.benchmarks.demo_pipeline.pans import clip
    from liteattention.benchmarks.demo_pipeline.sampler import comfy_noise, euler_flow, flow_sigmas

    wan = model(case.model, device)
    prompt, seed = other or (case.prompt, case.seed)
    noise = comfy_noise((1, wan.config.channels, *case.size), seed).to(device)
    prompts = (x.to(device) for x in case.prompts(prompt))
    steps = steps or case.steps
    sigmas = flow_sigmas(round(steps / case.denoise), case.shift)[-(steps + 1):].to(device)
    if case.denoise < 1:
        painted = clip(prompt, case.size, torch.Generator().manual_seed(seed)).to(device)
        noise = noise + (1 - sigmas[0]) / sigmas[0] * painted  # euler_flow multiplies by the first sigma
    return euler_flow(wan, noise, sigmas, *prompts, case.cfg,
                      heun=case.sampler == "heun", on_evaluation=on_evaluation, callback=callback).float().cpu()


class Calls:
    """Attention of one run by calls of [B, H, N, D], in which tiles are counted.

    Args:
        attend: (q, k, v, layer, number of the evaluation) -> (out, computed tiles, bool,
            or None where all are).
        first: the evaluation that is number 0; those before it are dense.
    """

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor | None]], first: int):
        self.attend, self.first = attend, first
        self.evaluation, self.shares = -1, []

    def on_evaluation(self, step: int, sigma: float, latent_shape: tuple[int, ...], rows: list) -> Callable:
        self.evaluation += 1

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, layer: int) -> Tensor:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            since = self.evaluation - self.first
            out, computed = (F.scaled_dot_product_attention(q, k, v), None) if since < 0 else \
                self.attend(q, k, v, layer, since)
            self.shares.append(1.0 if computed is None else computed.float().mean().item())
            return out.transpose(1, 2).flatten(2)

        return attention

    @property
    def skipped(self) -> float:
        return 1 - sum(self.shares) / len(self.shares)


def evaluations(case: Case, steps: int) -> int:
    """Of the model in a run of so many steps; Heun's last step has one."""
    return 2 * steps - 1 if case.sampler == "heun" else steps


def _node(case: Case, rule: object, device: str) -> tuple[Tensor, float]:
    """Through the runtime, by the node's defaults."""
    from liteattention.benchmarks.demo_pipeline.wan import sparse_attention
    from liteattention.runtime import LiteAttentionConfig, SamplingRun

    run = SamplingRun(LiteAttentionConfig(rule, min_tokens=1), case.steps)
    try:
        latent = sample(case, device, sparse_attention(model(case.model, device), run),
                        lambda step, *_: run.end_step(step))
    finally:
        summary = run.close()
    return latent, summary.skipped


def _sol(case: Case, tau: float, device: str) -> tuple[Tensor, float]:
    sol = sol_attention()[0]

    def attend(q, k, v, layer, evaluation):
        # Head by head: the reference holds all scores of a call at once.
        heads = [sol(*(x[:, h:h + 1].transpose(1, 2) for x in (q, k, v)), tau=tau) for h in range(q.shape[1])]
        return torch.cat(heads, 2).transpose(1, 2), sol_routes(q, k, tau)

    calls = Calls(attend, warmup(case))
    return sample(case, device, calls.on_evaluation), calls.skipped


def _simulation(case: Case, method: str, budget: float, device: str) -> tuple[Tensor, float]:
    first = warmup(case) - 1  # this one records
    simulated: Simulated = {**CANDIDATES, **PARTS}[method](budget, evaluations(case, case.steps) - first)

    def attend(q, k, v, layer, evaluation):
        got = simulated.attend(q, k, v, layer, evaluation)
        return got.out, got.computed

    calls = Calls(attend, first)
    return sample(case, device, calls.on_evaluation), calls.skipped


def _donated(case: Case, budget: float, device: str) -> tuple[Tensor, float]:
    """Masks of every evaluation, recorded in the donor's run, from the first evaluation on."""
    masks: dict[tuple[int, int], Tensor] = {}
    donor = Simulated(budget, case.steps)

    def record(q, k, v, layer, evaluation):
        got = donor.attend(q, k, v, layer, evaluation)
        masks[layer, evaluation] = got.keep
        return got.out, None

    def take(q, k, v, layer, evaluation):
        keep = masks[layer, evaluation]
        return simulate(q, k, v, keep, torch.full(q.shape[:2], -math.inf), donor.rules).out, keep

    sample(case, device, Calls(record, 0).on_evaluation, other=case.donor)
    calls = Calls(take, 0)
    return sample(case, device, calls.on_evaluation), calls.skipped


def run_setting(case: Case, setting: Setting, device: str) -> tuple[Tensor, float]:
    """(latent, share of the run's attention that is not computed; tiles, or evaluations of a run of fewer steps)."""
    from liteattention.runtime import Threshold

    if setting.kind == "dense":
        steps = int(setting.level)
        return sample(case, device, steps=steps), 1 - evaluations(case, steps) / evaluations(case, case.steps)
    if setting.kind == "sol":
        return _sol(case, setting.level, device)
    if setting.kind == "simulation":
        return _simulation(case, setting.method, setting.level, device)
    if setting.kind == "donor":
        return _donated(case, setting.level, device)
    return _node(case, Threshold(setting.level) if setting.kind == "threshold" else AnyBudget(setting.level), device)


def reference(case: Case, steps: int, device: str, folder: Path) -> Tensor:
    """The latent of a dense run of so many steps, made once and then read from `folder`."""
    path = folder / f"{case.name.replace(', ', '-').replace(' ', '')}-{steps}.safetensors"
    if not path.exists():
        latent = sample(case, device, steps=steps)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({"latent": latent.contiguous()}, partial)
        os.replace(partial, path)
    return load_file(path)["latent"]


def references(case: Case) -> list[int]:
    """Steps of the dense runs that a case is compared with."""
    return [case.steps] + [LONGER * case.steps] * case.longer


def row_of(case: Case, setting: Setting, device: str, folder: Path) -> dict:
    """One run as a row of the result: PSNR (None where equal), SSIM and motion against the dense run of full length,
    and PSNR against the run of three times as many steps (None where the case has none)."""
    from liteattention.benchmarks.demo_pipeline.clips import psnr
    from liteattention.demo.pixels import decode
    from liteattention.report.temporal import motion

    start = time.perf_counter()
    latent, skipped = run_setting(case, setting, device)
    seconds = time.perf_counter() - start
    clip, dense, *long = (decode(x) for x in [latent, *(reference(case, n, device, folder) for n in references(case))])
    frames = [psnr(a, b) for a, b in zip(clip, dense, strict=True)]
    whole = psnr(clip, dense)
    return {"case": case.name, "half": case.half, "model": case.model, "steps": case.steps, "tokens": case.tokens,
            "method": setting.method, "kind": setting.kind, "level": setting.level, "skipped": skipped,
            "psnr_db": whole if math.isfinite(whole) else None,
            "psnr_db_worst_frame": min(frames) if math.isfinite(min(frames)) else None, "ssim": ssim(clip, dense),
            **motion(dense, clip), "psnr_db_long": psnr(clip, long[0]) if long else None, "seconds": seconds}


def trace(case: Case, steps: int, device: str, layers: list[int], at_steps: list[int], path: Path) -> str:
    """Record q and k [2, H, N, D] float32 (rows: negative, positive prompt) of a dense run to safetensors.

    Raises:
        ValueError: a layer or step that the run does not have.
    """
    wan = model(case.model, device)
    for what, numbers, count in (("layer", layers, wan.config.num_layers), ("step", at_steps, steps)):
        for number in numbers:
            if not 0 <= number < count:
                raise ValueError(f"{what} {number} is not in 0..{count - 1}")
    found = {}

    def attend(q, k, v, layer, step):
        if layer in layers and step in at_steps:
            found.update({f"step{step}.layer{layer}.{name}": x.contiguous().cpu() for name, x in (("q", q), ("k", k))})
        return F.scaled_dot_product_attention(q, k, v), None

    sample(case, device, Calls(attend, 0).on_evaluation, steps=steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = "x".join(map(str, wan.grid((1, wan.config.channels, *case.size))))
    save_file(found, path, metadata={"case": case.name, "steps": str(steps), "grid": grid,
                                     "sm_scale": f"{wan.config.head_dim ** -0.5:.9g}"})
    size = sum(x.nbytes for x in found.values()) / 2**20
    return f"{path.name}: q, k of {len(found) // 2} calls, {case.tokens} tokens, {size:.0f} MB"
