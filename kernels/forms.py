"""Every form of the kernels that a run can launch. The pinned figures, what is compiled at each push and the self-test
of a GPU come from this table and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from .precision import AUTO_INT8_MIN_TOKENS, precision_on

NVIDIA = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
AMD = ("gfx942", "gfx1100", "gfx1201")

CHOICES = {
    # Settings of the node.
    "criterion": ("mass", "max"),
    "precision": ("auto", "full", "int8"),
    "pool_skipped": (True, False),
    # What models bring.
    "head_dim": (128, 64, 96),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "ragged": (True, False),
}
"""What changes the launched kernels, with the node's default or the usual case first."""
LENGTHS = (AUTO_INT8_MIN_TOKENS, AUTO_INT8_MIN_TOKENS - 1)
"""A long and a short call."""

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Form:
    """What one kind of call launches on an architecture. ragged: the number of keys is no multiple of 128."""

    head_dim: int
    dtype: torch.dtype
    int8: bool
    criterion: str
    pool_skipped: bool
    ragged: bool

    @property
    def name(self) -> str:
        """"d128 bf16 int8 mass pooled ragged"."""
        words = [f"d{self.head_dim}", _DTYPE_NAMES[self.dtype], "int8" * self.int8, self.criterion,
                 "pooled" * self.pool_skipped, "ragged" if self.ragged else "even"]
        return " ".join(filter(None, words))


def launchable(arch: str) -> list[Form]:
    """Every form that any settings of the node launch for any call."""
    every = (dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values()))
    return _distinct(arch, every)


def default_forms(arch: str) -> list[Form]:
    """What the node's defaults launch for usual calls, and so with its other rule."""
    return _distinct(arch, ({"criterion": criterion} for criterion in CHOICES["criterion"]))


def near_defaults(arch: str) -> list[Form]:
    """`default_forms`, and every form that one setting or one property of a call makes of the default one."""
    return _distinct(arch, [{}, *({name: value} for name, values in CHOICES.items() for value in values[1:])])


def _distinct(arch: str, changes) -> list[Form]:
    """The forms of the usual call with these changes, each once, for long and short calls."""
    found = {}
    for change in changes:
        choice = {name: values[0] for name, values in CHOICES.items()} | change
        requested = choice.pop("precision")
        for seqlen in LENGTHS:
            int8 = precision_on(arch, choice["dtype"], seqlen, requested).name == "int8"
            found[Form(int8=int8, **choice)] = None
    return list(found)
