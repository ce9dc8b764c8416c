"""Trains the second model of the quality lab, which draws camera pans over textures, on one CPU core:

    python benchmarks/demo_pipeline/train.py --out benchmarks/models/tiny_pans.safetensors

Other heads, depth and pictures than the demo model, so that what is measured on one can be confirmed on the other.
Rectified flow from random weights on clips that `pans.py` paints; no data is read. The seed fixes weights and clips.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

SIZES = (((5, 16, 16), 4, 0.62), ((7, 20, 20), 2, 0.2), ((9, 24, 24), 1, 0.1), ((9, 32, 32), 1, 0.08))
"""Latent (frames, rows, columns), clips in a batch, share of the batches."""
SHIFT = 3.0
EMPTY = 0.1
"""Of the prompts are empty, for cfg."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800, help="of the optimiser; default %(default)s")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def new_model():
    """Random weights: gates half open, a head that starts with nothing."""
    from liteattention.benchmarks.demo_pipeline.pans import CHANNELS, TEXT_DIM
    from liteattention.benchmarks.demo_pipeline.wan import TinyWan, WanConfig

    model = TinyWan(WanConfig(dim=192, num_layers=6, ffn_dim=384, freq_dim=128, text_dim=TEXT_DIM, channels=CHANNELS,
                              head_dim=64))
    with torch.no_grad():
        for block in model.blocks:
            block.modulation[:, 2::3] = 0.5
        model.time_projection[1].weight.mul_(0.2)
        model.head.head.weight.zero_()
    return model


def optimisers(model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def loss_of(model, clips: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the flow at random times, small prompts left out."""
    count = clips.shape[0]
    u = torch.rand(count, generator=generator)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(clips.shape, generator=generator)
    prompts = prompts * (torch.rand(count, 1, 1, generator=generator) >= EMPTY)
    at = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        flow = model((1 - at) * clips + at * noise, sigma * 1000, prompts)
    return (flow.float() - (noise - clips)).square().mean()


def train(model, steps: int, rate: float, seed: int, say: Callable[[str], None]) -> None:
    """The whole training; the learning rate rises for 100 steps and then falls to zero in a line."""
    from liteattention.benchmarks.demo_pipeline.pans import batch

    generator = torch.Generator().manual_seed(seed)
    together = optimisers(model, rate)
    shares = torch.tensor([share for *_, share in SIZES])
    mean, start = None, time.perf_counter()
    for step in range(steps):
        size, count, _ = SIZES[int(torch.multinomial(shares, 1, generator=generator))]
        loss = loss_of(model, *batch(count, size, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in together:
            for group in optimiser.param_groups:
                group["lr"] = rate * min((step + 1) / 100, (steps - step) / steps)
            optimiser.step()
            optimiser.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            say(f"step {step + 1} of {steps}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s")


def main() -> None:
    args = make_parser().parse_args()
    from load_pack import load_pack

    load_pack()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
    train(model, args.steps, args.rate, args.seed, lambda line: print(line, flush=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, args.out,
              metadata={"head_dim": str(model.config.head_dim)})
    print(f"{args.out.name}: {args.out.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
