"""Puts `run_kit` on the path; a sparse kernel that can be watched and made to fail."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


class Kernel:
    """In front of the sparse kernel. Keeps the keyword arguments of each call, and the masks' tiles before it.

    Attributes:
        fails: (keyword arguments) -> what to raise, or None.
    """

    def __init__(self, attention):
        self.attention, self.calls, self.before = attention, [], []
        self.fails = lambda kwargs: None

    def __call__(self, q, k, v, masks, **kwargs):
        self.calls.append(kwargs)
        self.before.append([mask.to_bool() for mask in masks])
        error = self.fails(kwargs)
        if error is not None:
            raise error
        return self.attention(q, k, v, masks, **kwargs)


@pytest.fixture
def kernel(monkeypatch):
    from liteattention.runtime import compute

    kernel = Kernel(compute.lite_attention)
    monkeypatch.setattr(compute, "lite_attention", kernel)
    return kernel
