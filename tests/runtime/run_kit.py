"""A two-layer "model" whose attention goes through a sampling run, and its dense counterpart."""

import threading

import torch

from liteattention.runtime import AttentionCall, LayerId, LiteAttentionConfig, SamplingRun, Threshold

N, HEADS, D = 640, 2, 64
LAYERS = [LayerId("double", i, 2) for i in range(2)]
TILES = 2 * HEADS * 25
"""Of one call over two rows."""


def tokens(step, n=N):
    """q, k, v [2, N, H*D] whose key tiles differ in strength, a little other at each step."""
    generator = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(2, n, HEADS, D, generator=generator) for _ in range(3))
    q[..., 0] += 8
    k[..., 0] += torch.tensor([8.0, 0.0, 5.0, 1.0, 6.0])[torch.arange(n) // 128 % 5].view(1, n, 1)
    return [x.flatten(2) for x in (q, k, v)]


def dense(q, k, v):
    split = [x.unflatten(-1, (HEADS, D)).transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Fallback:
    """Counts the calls that it computes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v):
        self.calls += 1
        return dense(q, k, v)


def sampling_run(total=8, break_evens=None, carried=None, **settings):
    settings = {"rule": Threshold(-4.0), "min_tokens": 128, **settings}
    return SamplingRun(LiteAttentionConfig(**settings), total, break_evens=break_evens, carried=carried)


def forward(run, step, rows=("negative", "positive"), fallback=dense, video_tokens=N, layers=LAYERS, n=N, **context):
    """One forward pass over all layers; the outputs."""
    names = None if rows is None else [(row, 0) for row in rows]
    forward_pass = run.forward_pass(model="m", rows=names, video_tokens=video_tokens, **context)
    q, k, v = (x[:len(rows or (1, 2))] for x in tokens(step, n))
    return [forward_pass.attend(AttentionCall.from_hook(q, k, v, HEADS), layer, lambda: fallback(q, k, v))
            for layer in layers]


def play(run, steps, first=0, **kwargs):
    """Steps of one forward pass each; for each the skipped share and the calls that the fallback attention computed."""
    fallback = kwargs.pop("fallback", None) or Fallback()
    skipped, calls = [], []
    for step in range(steps):
        before = fallback.calls
        forward(run, first + step, fallback=fallback, **kwargs)
        skipped.append(run.end_step(run.step).skipped)
        calls.append(fallback.calls - before)
    return skipped, calls


def masks(run):
    """Bits of every mask of a run by layer and row."""
    return {(key, row): mask.to_bool() for key, rows in run.masks.all_masks().items() for row, mask in rows.items()}


def passes(run):
    return sorted({mask.passes[0] for rows in run.masks.all_masks().values() for mask in rows.values()})


def in_threads(work, arguments):
    """`work` for each of the arguments at once."""
    barrier = threading.Barrier(len(arguments))
    threads = [threading.Thread(target=lambda a=argument: (barrier.wait(), work(a))) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
