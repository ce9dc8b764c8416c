"""What the pack uses of ComfyUI is there, and where it is not, attention stays as it was."""

import importlib
import re
from pathlib import Path

import comfy.ldm.modules.attention as attention
import pytest
import torch
from comfyui_version import __version__
from host_kit import LAYERS
from interop_kit import SMALL, plain

from liteattention.host import compat, run_handle
from liteattention.runtime import RunHandle

HOST = Path(compat.__file__).parent
YOUNGER = {"comfy.model_prefetch:pause_malloc_graph": (0, 34, 0),
           "comfy.ldm.modules.attention:COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE": (0, 33, 0)}
"""Symbols that the pack can do without, and the first ComfyUI that has them."""


def used():
    """Every path of a symbol that is written in host/."""
    text = "".join(path.read_text(encoding="utf-8") for path in HOST.glob("*.py"))
    found = set(re.findall(r'"(comfy[\w.]*:[\w.]+)"', text))
    return found | {f"comfy.ldm.modules.attention:{name}" for name in ("optimized_attention", "attention_pytorch")}


def test_every_symbol_that_the_pack_uses_is_in_this_comfyui():
    version = tuple(int(part) for part in __version__.split(".")[:3])
    assert len(used()) >= 10 and set(compat.REQUIRED) <= used() and YOUNGER.keys() <= used()
    gone = {path for path in used() if compat.core(path) is None}
    assert gone == {path for path, since in YOUNGER.items() if version < since}


def test_comfyui_is_reached_by_these_paths_alone():
    for path in HOST.glob("*.py"):
        assert not re.search(r"^\s*(import|from) comfy", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


@pytest.mark.parametrize("path", compat.REQUIRED)
def test_without_a_symbol_attention_is_left_as_it_was_and_one_line_says_so(kit, monkeypatch, caplog, path):
    expected, model = plain(kit), kit.model
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        assert kit.lite(model) is model and run_handle(model) is None
    assert torch.equal(kit.sample(model, 3, size=SMALL), expected)
    line, = (record.getMessage() for record in caplog.records if record.name == "LiteAttention")
    assert line == f"LiteAttention is off: this ComfyUI has no {path}. Update LiteAttention"


def test_a_run_does_without_the_attention_that_core_has_chosen(kit, monkeypatch):
    for name in ("optimized_attention", "attention_pytorch"):
        monkeypatch.delattr(attention, name)
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle), 3, size=SMALL)
    assert handle.summary.sparse_calls == 3 * LAYERS and handle.summary.fallback
