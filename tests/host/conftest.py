"""A real ComfyUI in this process, on the CPU, with the tiny demo model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def kit(model_folder):
    """Model, conditionings and samplers (see host_kit.py)."""
    from host_kit import Kit

    return Kit(model_folder)


@pytest.fixture
def sessions(monkeypatch):
    """Every session that the patched models open, in order, each with a snapshot of its masks taken at its end."""
    from liteattention.runtime import Session

    opened = []

    class Watched(Session):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.passes, self.bits = {}, {}
            opened.append(self)

        def close(self):
            for key, rows in self.masks.all_masks().items():
                for row, mask in rows.items():
                    self.passes[key, row] = mask.passes[0]
                    self.bits[key, row] = mask.to_bool().clone()
            return super().close()

    monkeypatch.setattr(sys.modules["liteattention.host.attach"], "Session", Watched)
    return opened
