"""Makes the pack importable in a worker. The worker gets these functions by value, because a custom node's module is
named by its path and cannot be imported there; so they use the standard library alone."""

import importlib
import sys
import types
from pathlib import Path

NAME = "liteattention"


def _worker(root):
    """The module `worker` of the pack in folder `root`."""
    if not (Path(root) / "host" / "raylight" / "worker.py").is_file():
        raise FileNotFoundError(f"LiteAttention is not at {root} on the machine of a Raylight worker. Install the same "
                                "version of the pack in the same folder there.")
    pack = sys.modules.get(NAME)
    if pack is None:
        pack = sys.modules[NAME] = types.ModuleType(NAME)
        pack.__path__ = [root]
    elif list(pack.__path__) != [root]:
        raise ImportError(f"A Raylight worker has loaded LiteAttention from {pack.__path__[0]}, not from {root}. "
                          "Restart ComfyUI.")
    return importlib.import_module(f"{NAME}.host.raylight.worker")


def apply(model, root, settings, parallel):
    """Raylight's `model_function_runner` keeps what this returns as the worker's model."""
    return _worker(root).apply(model, settings, parallel)


def last_run(model, root):
    """(state, summary as plain values or None) of the model's last run."""
    return _worker(root).last_run(model)
