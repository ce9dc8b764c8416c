"""A two-layer "model" whose attention goes through a session, and its dense counterpart."""

import torch

from liteattention.runtime import AttentionCall, LayerId, LiteAttentionConfig, Session

N, HEADS, D = 640, 2, 64
LAYERS = [LayerId("double", i, 2) for i in range(2)]


def tokens(step):
    """q, k, v [2, N, H*D] whose key tiles differ in strength, a little other at each step."""
    generator = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(2, N, HEADS, D, generator=generator) for _ in range(3))
    q[..., 0] += 8
    k[..., 0] += torch.tensor([8.0, 0.0, 5.0, 1.0, 6.0])[torch.arange(N) // 128].view(1, N, 1)
    return [x.flatten(2) for x in (q, k, v)]


def dense(q, k, v):
    split = [x.unflatten(-1, (HEADS, D)).transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Previous:
    def __init__(self):
        self.calls = 0


def forward(session, step, rows=("negative", "positive"), previous=None, latent_tokens=N, layers=LAYERS, **kwargs):
    """One evaluation over all layers; the outputs."""
    context = session.evaluation(model="m", rows=[(r, 0) for r in rows], latent_tokens=latent_tokens, **kwargs)
    q, k, v = (x[:len(rows)] for x in tokens(step))
    outs = []
    for layer in layers:
        def run_previous():
            if previous is not None:
                previous.calls += 1
            return dense(q, k, v)
        outs.append(context.attend(AttentionCall.from_hook(q, k, v, HEADS), layer, run_previous))
    return outs


def session(total=8, break_evens=None, **kwargs):
    settings = {"threshold": -4.0, "min_tokens": 128, **kwargs}
    return Session(LiteAttentionConfig(**settings), total, break_evens=break_evens)
