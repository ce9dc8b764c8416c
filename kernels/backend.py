"""Which backend a call runs on: Triton where a self-test has passed, else torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .system import setting
from .triton_probe import triton_verdict

BACKENDS = ("auto", "triton", "torch")
BACKEND_ENV = "LITEATTENTION_BACKEND"


@dataclass(frozen=True)
class BackendChoice:
    """Attributes:
        name: "triton" or "torch".
        asked: it was named by argument or environment, not chosen automatically.
        reason: why Triton was passed over and what to install, or why it does without pooled keys, or "".
        pooled: whether pooled keys and values have passed the self-test, too.
    """

    name: str
    asked: bool
    reason: str = ""
    pooled: bool = True


def resolve_backend(device: torch.device, requested: str | None = None) -> BackendChoice:
    """The backend for calls on `device`, and how it came about.

    Args:
        requested: "triton", "torch", "auto"; None asks the environment variable LITEATTENTION_BACKEND, then
            "auto": Triton on CUDA and ROCm devices where its self-test passes, torch elsewhere.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run (with the reason). A name given on purpose
            never falls back.
    """
    name = requested or setting(BACKEND_ENV) or "auto"
    if name not in BACKENDS:
        source = "backend" if requested else f"environment variable {BACKEND_ENV}"
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(BACKENDS)}")
    if name == "torch":
        return BackendChoice("torch", True)
    if name == "auto" and device.type == "cpu":
        return BackendChoice("torch", False)
    verdict = triton_verdict(device)
    if verdict.usable:
        return BackendChoice("triton", name == "triton", verdict.reason, verdict.pooled)
    if name == "triton":
        raise ValueError(f"backend is 'triton', which cannot run on {device}: {verdict.reason}")
    return BackendChoice("torch", False, verdict.reason)


def choose_backend(device: torch.device, requested: str | None = None) -> str:
    """The name alone: "triton" or "torch". See `resolve_backend`."""
    return resolve_backend(device, requested).name
