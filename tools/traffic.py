"""Estimates of what one video on several GPUs exchanges, for docs/multi-gpu.md: python tools/traffic.py [--write]

Of your own machine: python tools/traffic.py --tokens 75600 --tflops 140 --gb-per-s 10
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "multi-gpu.md"
BEGIN, END = "<!-- {}: python tools/traffic.py --write -->\n", "<!-- end of the table -->\n"
GPUS = (2, 4, 8)
WIDTH, FEED_FORWARD, LAYERS = 5120, 13824, 40
"""Wan 14B: 40 heads x 128, and its 40 blocks."""
TOKENS = {"720p": 75_600, "480p": 32_760}
"""81 frames."""
HEADS = {"Wan 14B (T2V, I2V, VACE, Camera)": 40, "Wan 1.3B (T2V, VACE, Camera)": 12, "Wan 2.2 5B (TI2V)": 24,
         "MiniMax H3": 56}


class Machine(NamedTuple):
    """Attributes:
        flops: dense attention and linear layers per GPU and second. bandwidth: bytes per second and direction.
    """

    name: str
    flops: float
    bandwidth: float

    def attention_s(self, tokens: int, gpus: int) -> float:
        """Dense attention of a block on one of the GPUs."""
        return 4 * tokens**2 * WIDTH / gpus / self.flops

    def linear_s(self, tokens: int, gpus: int) -> float:
        """Linear layers of a block: q, k, v, o; q and o of cross-attention; the feed-forward."""
        return 2 * tokens * (6 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD) / gpus / self.flops

    def exchange_s(self, tokens: int, gpus: int) -> float:
        return exchanged_bytes(tokens, gpus) / self.bandwidth

    def even(self, tokens: int, gpus: int) -> float:
        """The share of attention to skip at which what is left takes as long as the exchange."""
        return 1 - self.exchange_s(tokens, gpus) / self.attention_s(tokens, gpus)

    def gain(self, tokens: int, gpus: int, skipped: float) -> float:
        """How much faster a block is. Raylight exchanges q and the result of cross-attention, too: half as much."""
        attention = self.attention_s(tokens, gpus)
        rest = self.linear_s(tokens, gpus) + 1.5 * self.exchange_s(tokens, gpus)
        return (attention + rest) / (attention * (1 - skipped) + rest)


MACHINES = (Machine("H100 or H200, NVLink", 350e12, 300e9), Machine("the same, PCIe 5 x16", 350e12, 45e9),
            Machine("the same, PCIe 4 x16", 350e12, 20e9), Machine("RTX 4090, PCIe 4 x16, peer to peer", 140e12, 20e9),
            Machine("RTX 4090, through main memory", 140e12, 10e9),
            Machine("RTX 3090, through main memory", 58e12, 10e9))
"""Rates are assumptions."""


def exchanged_bytes(tokens: int, gpus: int) -> float:
    """What a GPU sends per layer: the others' share of its part of q, k, v and the result, 2 bytes an element."""
    return 4 * tokens * WIDTH * 2 / gpus * (gpus - 1) / gpus


def degrees(heads: int) -> list[int]:
    """Numbers of GPUs up to 8 that heads can be dealt out to."""
    return [gpus for gpus in range(2, 9) if heads % gpus == 0]


def tables() -> dict[str, str]:
    """Markdown tables by what they hold."""
    def table(*rows: tuple) -> str:
        lines = ["| " + " | ".join(map(str, row)) + " |\n" for row in rows]
        return "".join([lines[0], "|" + "---|" * len(rows[0]) + "\n", *lines[1:]])

    def shares(machine: Machine, tokens: int) -> str:
        return " / ".join(f"{max(machine.even(tokens, gpus), 0) * 100:.0f}" for gpus in GPUS) + " %"

    tokens = TOKENS["720p"]
    return {
        "heads": table(("model", "heads", "ulysses_degree"),
                       *((name, heads, ", ".join(map(str, degrees(heads)))) for name, heads in HEADS.items())),
        "bytes": table(("Wan 14B, 720p, 81 frames", *(f"{gpus} GPUs" for gpus in GPUS)),
                       ("each GPU sends per layer", *(f"{exchanged_bytes(tokens, g) / 1e6:.0f} MB" for g in GPUS)),
                       (f"and per forward pass of {LAYERS} layers",
                        *(f"{LAYERS * exchanged_bytes(tokens, g) / 1e9:.0f} GB" for g in GPUS))),
        "machines": table(("2 / 4 / 8 GPUs", "TFLOP/s", "GB/s", *(f"equal at, {name}" for name in TOKENS),
                           "a block with 50 % skipped, 720p"),
                          *((m.name, f"{m.flops / 1e12:.0f}", f"{m.bandwidth / 1e9:.0f}",
                             *(shares(m, count) for count in TOKENS.values()),
                             " / ".join(f"{m.gain(tokens, gpus, 0.5):.2f}x" for gpus in GPUS)) for m in MACHINES)),
    }


def page() -> str:
    """docs/multi-gpu.md with the tables as they have to be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        before, rest = text.split(BEGIN.format(name))
        text = before + BEGIN.format(name) + table + END + rest.split(END, 1)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/multi-gpu.md")
    parser.add_argument("--tokens", type=int, default=TOKENS["720p"])
    parser.add_argument("--tflops", type=float, help="of attention on one of your GPUs")
    parser.add_argument("--gb-per-s", type=float, default=10.0, help="between two of your GPUs, one direction")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(), encoding="utf-8")
    elif args.tflops is None:
        print("\n".join(tables().values()), end="")
    else:
        machine = Machine("yours", args.tflops * 1e12, args.gb_per_s * 1e9)
        for gpus in GPUS:
            print(f"{gpus} GPUs: exchange and attention take equally long at {machine.even(args.tokens, gpus):.0%} "
                  f"skipped; at 50 % a block is {machine.gain(args.tokens, gpus, 0.5):.2f} times as fast")


if __name__ == "__main__":
    main()
