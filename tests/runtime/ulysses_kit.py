"""A small "model" cut by tokens over processes, as Ulysses cuts one: each attention gathers all tokens of a share of
the heads, the sampling run of a process sees that share, and nothing else goes between processes.

`processes` starts them; they import this module, so no pytest in here.
"""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from load_pack import load_pack  # noqa: E402

load_pack()

from liteattention.runtime import (  # noqa: E402
    AttentionCall,
    ErrorBudget,
    LayerId,
    LiteAttentionConfig,
    SamplingRun,
    Threshold,
    VideoTokens,
)

HEADS, HEAD_DIM, LAYERS, STEPS = 8, 64, 2, 4
ROWS = [("negative", 0), ("positive", 0)]
RULES = {
    "max": {"rule": Threshold(-4.0), "pool_skipped": False},
    "mass": {"rule": ErrorBudget(0.5), "pool_skipped": False},
    "mass, pooled": {"rule": ErrorBudget(0.5), "pool_skipped": True},
}
LIMIT_S = 300
"""For all that the processes of a test do; on a busy machine mostly to start."""


class Case(NamedTuple):
    """A run."""

    rule: str
    tokens: int

    def padded(self, parts):
        """Tokens with those that make them a multiple of the number of processes."""
        return -(-self.tokens // parts) * parts


class Played(NamedTuple):
    """What the run of one process leaves.

    Attributes:
        latent: of its tokens. masks: bool [1, heads, tiles, tiles] by layer and row.
    """

    latent: torch.Tensor
    masks: dict
    tiles_computed: int
    tiles_total: int
    mask_bytes: int
    sparse_calls: int
    dense_calls: dict
    skipped: float
    notes: list


def make_latent(tokens, padded):
    """[2, padded, heads, head_dim] whose tiles and heads differ in strength; pads are rows of zeros."""
    x = torch.randn(2, tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([8.0, 0.0, 5.0, 1.0, 6.0])[torch.arange(tokens) // 128 % 5]
    x[..., 0] += strength.view(1, tokens, 1) * torch.linspace(0.5, 1.2, HEADS).view(1, 1, HEADS)
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - tokens))


def qkv(x, step, layer):
    """Of local tokens, element by element: a matmul's rounding may depend on how many rows it has."""
    q = x * (0.5 + 0.1 * layer)
    q[..., 0] = 8 + 0.1 * step
    return q, x, x.roll(1, -1)


def play(case, padded, rank=0, parts=1, exchange=lambda x, gather: x):
    """The run of process `rank` of `parts`. exchange(x, True): from all heads of its tokens to all tokens of its heads;
    False: back."""
    x = make_latent(case.tokens, padded).chunk(parts, 1)[rank]
    run = SamplingRun(LiteAttentionConfig(min_tokens=128, warmup_steps=1, **RULES[case.rule]), STEPS)
    for step in range(STEPS):
        forward_pass = run.forward_pass(model="m", rows=ROWS, video_tokens=VideoTokens(case.tokens, front=0))
        for layer in range(LAYERS):
            q, k, v = (exchange(part, True).transpose(1, 2) for part in qkv(x, step, layer))
            call = AttentionCall.from_hook(q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True)
            fallback = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)
            out = forward_pass.attend(call, LayerId("block", layer, LAYERS), fallback)
            x = x + 0.1 * exchange(out.transpose(1, 2).contiguous(), False)
        run.end_step(step)
    masks = {(key.name, row): mask.to_bool() for key, rows in run.masks.all_masks().items()
             for row, mask in rows.items()}
    done = run.close()
    return Played(x, masks, done.tiles_computed, done.tiles_total, done.mask_bytes, done.sparse_calls,
                  {reason.text: calls for reason, calls in done.dense_calls.items()}, done.skipped, done.notes)


def all_to_all(x, gather):
    """Between [2, N/P, H, D] (tokens) and [2, N, H/P, D] (heads)."""
    cut, join = (2, 1) if gather else (1, 2)
    sent = torch.stack(x.chunk(dist.get_world_size(), cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return torch.cat(list(received), join)


def _work(cases, rank, parts, folder, answer):
    # A parent that was killed cannot end its processes.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    stacks = open(folder / f"{rank}.txt", "w", encoding="utf-8")
    faulthandler.dump_traceback_later(LIMIT_S / 2, file=stacks)
    try:
        store = dist.FileStore(str(folder / "store"), parts)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=parts, timeout=timedelta(seconds=LIMIT_S))
        torch.save([play(case, case.padded(parts), rank, parts, all_to_all) for case in cases], folder / f"{rank}.pt")
        answer.send("")
    except BaseException:
        answer.send(traceback.format_exc())
    threading.Event().wait()  # the parent ends all of them: how a process leaves its group is not tested


def processes(cases_by_rank, folder):
    """A process for each list of cases; the lists of what they have played. No process outlives the call.

    Raises:
        RuntimeError: a process has failed, or they were not done in time; with what they said.
    """
    context, parts = multiprocessing.get_context("spawn"), len(cases_by_rank)
    started, answers, until = [], [], time.monotonic() + LIMIT_S
    try:
        for rank, cases in enumerate(cases_by_rank):
            reader, writer = context.Pipe(duplex=False)
            started.append(context.Process(target=_work, args=(cases, rank, parts, folder, writer), daemon=True))
            started[-1].start()
            writer.close()
            answers.append(reader)
        while answers:
            ready = wait(answers, max(0, until - time.monotonic()))
            if not ready:
                stacks = [path.read_text(encoding="utf-8") for path in folder.glob("*.txt")]
                raise RuntimeError("\n".join([f"not done in {LIMIT_S} s", *stacks]))
            for reader in ready:
                answers.remove(reader)
                if said := _received(reader):
                    raise RuntimeError(said)
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(parts)]


def _received(reader):
    try:
        return reader.recv()
    except EOFError:
        return "a process ended without a word"
