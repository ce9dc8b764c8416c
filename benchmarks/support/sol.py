"""Sol-Attn: comfy-kitchen's reference code, and which key blocks it computes."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Tokens per side of a block."""
SINCE = (0, 2, 40)
"""The first comfy-kitchen that has it."""


def block_means(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, H, KT, D]; the last block may be short."""
    counts = torch.full((-(-x.shape[2] // BLOCK), 1), float(BLOCK), device=x.device)
    counts[-1] -= -x.shape[2] % BLOCK
    return F.pad(x, (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)).sum(3) / counts


def sol_routes(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """The key blocks of 64 that Sol-Attn computes exactly, bool [B, H, QT, KT], by its rule: the score of the block's
    mean query and mean key stands out from those of the other blocks by tau standard deviations; the variance is the
    sum over channels of mean query squared times the block means' variance. The diagonal and its neighbours always.

    Source: Sol-Attn, arXiv 2607.24027.
    """
    middle_q, middle_k = (block_means(x) for x in (q, k))
    middle_k = middle_k - middle_k.mean(2, keepdim=True)
    unit = q.shape[-1] ** -0.5 / math.log(2)
    sigma = (unit ** 2 * middle_q.square() @ middle_k.square().mean(2).unsqueeze(-1) + 1e-6).sqrt()
    number = torch.arange(middle_q.shape[2], device=q.device)
    return (unit * middle_q @ middle_k.mT > tau * sigma) | ((number[:, None] - number).abs() <= 1)


def sol_attention() -> tuple[object | None, str]:
    """comfy-kitchen's reference of Sol-Attn and its version, or None and why not."""
    try:
        version = importlib.metadata.version("comfy-kitchen")
    except importlib.metadata.PackageNotFoundError:
        return None, "comfy-kitchen is not installed (pip install comfy-kitchen)"
    if tuple(int(x) for x in re.findall(r"\d+", version)[:3]) < SINCE:
        return None, f"comfy-kitchen {version} is older than {'.'.join(map(str, SINCE))}"
    try:
        return importlib.import_module("comfy_kitchen.backends.eager.sol_attn").sol_attn, version
    except (ImportError, AttributeError) as error:
        return None, f"comfy-kitchen {version}: {error}"
