"""Load this pack from its location as the package `liteattention`, whatever its folder is called."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_pack():
    """The pack as `liteattention`; afterwards `from liteattention.kernels import …` works. ComfyUI is not needed.

    The repository root is taken off sys.path: there, the folder `nodes` would hide ComfyUI's module `nodes`.
    """
    if "liteattention" in sys.modules:
        return sys.modules["liteattention"]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    spec = importlib.util.spec_from_file_location("liteattention", ROOT / "__init__.py",
                                                  submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["liteattention"] = module
    spec.loader.exec_module(module)
    return module
