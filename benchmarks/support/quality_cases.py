"""The cases of the quality lab: two models, and what is sampled with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"shapes": ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors",
          "pans": ROOT / "benchmarks" / "models" / "tiny_pans.safetensors"}
CHOOSING, REPORTING = "choosing", "reporting"


@dataclass(frozen=True)
class Case:
    """One clip.

    Attributes:
        model: of MODELS. prompt: arguments of that model's `prompt_tokens`. seed: of the noise.
        size: latent frames, rows, columns. steps, sampler ("euler" or "heun"), cfg, shift: how it is sampled.
        half: settings are chosen on one half and reported on the other.
        denoise: share of the schedule that is run, from a painted clip of the prompt; 1 starts from noise alone.
        donor: prompt and seed of a run whose masks this case may take over, or None.
    """

    model: str
    prompt: tuple[int, ...]
    seed: int
    size: tuple[int, int, int]
    steps: int
    sampler: str = "euler"
    cfg: float = 2.0
    shift: float = 3.0
    half: str = CHOOSING
    denoise: float = 1.0
    donor: tuple[tuple[int, ...], int] | None = None

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.size))
        denoise = "" if self.denoise == 1 else f"denoise {self.denoise:g}, "
        return (f"{self.model} {size}, {self.sampler} {self.steps}, {denoise}cfg {self.cfg:g}, shift {self.shift:g}, "
                f"seed {self.seed}")

    @property
    def longer(self) -> bool:
        """Whether it is also compared with a dense run of more steps."""
        return self.half == REPORTING and self.steps >= 10

    @property
    def tokens(self) -> int:
        """Of the video; both models have a patch of 2 x 2."""
        return self.size[0] * self.size[1] * self.size[2] // 4

    def prompts(self, prompt: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Positive (of `prompt`, by default the case's) and empty conditioning [1, 4, text_dim]."""
        if self.model == "shapes":
            from liteattention.demo.pixels import empty_prompt, prompt_tokens
        else:
            from liteattention.benchmarks.demo_pipeline.pans import empty_prompt, prompt_tokens
        return prompt_tokens(*(prompt or self.prompt)), empty_prompt()


PART = {"denoise": 0.25}
"""The second model is too small to make a whole clip up: it goes on from a noisy one, as in video to video."""
CASES = (
    Case("shapes", (0, 2, 1), 3, (5, 32, 32), 20),
    Case("shapes", (1, 1, 2), 17, (9, 24, 24), 10, "heun", cfg=5.0),
    Case("shapes", (0, 3, 0), 8, (9, 32, 32), 8, cfg=1.0, shift=8.0, donor=((1, 2, 2), 21)),
    Case("pans", (0, 0, 1, 1), 4, (9, 24, 24), 20, **PART),
    Case("pans", (2, 1, 2, 0), 9, (9, 32, 32), 4, cfg=1.0, shift=5.0, **PART, donor=((1, 2, 0, 1), 22)),
    Case("pans", (1, 3, 0, 1), 12, (9, 40, 40), 8, cfg=1.0, **PART, donor=((0, 1, 2, 1), 23)),
    Case("pans", (1, 1, 2, 1), 11, (9, 48, 48), 4, cfg=1.0, shift=5.0, **PART, half=REPORTING,
         donor=((0, 2, 0, 1), 24)),
    Case("shapes", (0, 4, 0), 5, (7, 28, 28), 20, cfg=5.0, shift=1.0, half=REPORTING),
    Case("shapes", (1, 2, 1), 14, (9, 24, 24), 20, shift=8.0, half=REPORTING),
    Case("pans", (1, 0, 2, 1), 6, (7, 28, 28), 20, **PART, half=REPORTING),
    Case("pans", (2, 2, 1, 1), 7, (9, 24, 24), 10, "heun", cfg=5.0, **PART, half=REPORTING),
    Case("pans", (0, 3, 1, 0), 15, (9, 32, 32), 8, cfg=1.0, shift=8.0, **PART, half=REPORTING,
         donor=((2, 0, 0, 1), 25)),
)
SMALL_CASES = (Case("shapes", (0, 1, 1), 1, (3, 16, 16), 3, donor=((1, 2, 1), 2)),
               Case("pans", (0, 1, 1, 1), 1, (3, 16, 16), 3, "heun", **PART, half=REPORTING))
"""192 tokens."""
