"""What the first sparse call of a process would wait for, done before a run."""

from __future__ import annotations

import logging

import torch

from ..kernels import TILE, SkipMask, lite_attention, precision_choice
from .compute import SparseAttention
from .config import LiteAttentionConfig
from .masks import LayerKey, MaskTable
from .notes import Notes

log = logging.getLogger("LiteAttention")

_LONG = 1_000_000
"""Tokens from which every choice that depends on the length is the one for long sequences."""


def prepare(config: LiteAttentionConfig, device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Ask for the backend of `device`, which tests itself once per machine, and compile its kernels.

    Processes that exchange data in every layer wait for the slowest of them, but not for minutes.

    Returns:
        The backend, or None where calls stay dense; why, a run notes itself.
    """
    notes = Notes()
    sparse = SparseAttention(config, MaskTable(note=notes.add), notes)
    backend = sparse.backend(device)
    try:
        if backend is not None:
            _compile(config, backend, device, head_dim, dtype)
    except Exception as error:  # the run meets it again, and goes on dense
        log.warning("LiteAttention: the kernels are not ready before the run. %s", error)
    finally:
        sparse.close()
    return backend


def _compile(config: LiteAttentionConfig, backend: str, device: torch.device, head_dim: int,
             dtype: torch.dtype) -> None:
    tokens = 4 * TILE
    q = torch.zeros(1, tokens, 1, head_dim, dtype=dtype, device=device).transpose(1, 2)
    test = config.rule.skip_test(LayerKey("", device, "", 0), 0, tokens)
    chosen = precision_choice(device, head_dim, dtype, _LONG, config.precision, backend).name
    for precision in dict.fromkeys(("full", chosen)):
        mask = SkipMask.full(1, 1, tokens, device=device)
        for _ in range(2):  # forward and backward
            lite_attention(q, q, q, mask, threshold=test.threshold, criterion=test.criterion,
                           pool_skipped=config.pool_skipped, precision=precision, backend=backend)
