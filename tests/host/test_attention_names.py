"""The attention that computes what is left has a name, and a faster one is named where there is one."""

import comfy.ldm.modules.attention as attention
import pytest
import torch

from liteattention.host import compat
from liteattention.runtime import RunHandle

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def override(func, *args, **kwargs):
    return func(*args, **kwargs)


@pytest.mark.parametrize("module, said", [
    ("/somewhere/custom_nodes/ComfyUI-KJNodes.nodes.model_optimization_nodes", "override of ComfyUI-KJNodes"),
    (r"C:\ComfyUI\custom_nodes\ComfyUI-KJNodes", "override of ComfyUI-KJNodes"),
    ("comfy_extras.nodes_nag", "override of comfy_extras.nodes_nag"), (None, "override")])
def test_an_override_is_named_with_its_pack_and_without_a_path(monkeypatch, module, said):
    monkeypatch.setattr(override, "__module__", module)
    assert compat.attention_name(override) == said


def test_objects_without_a_name_have_the_name_of_their_class():
    class Patch:
        __call__ = staticmethod(override)

    assert compat.attention_name(Patch()).startswith("Patch")


def test_the_summary_names_the_fallback_attention(kit):
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle))
    own = handle.summary.fallback
    assert own in compat._NAMES.values() and f"(dense by {own})" in handle.summary.text()
    kit.sample(kit.lite(kit.watched(kit.model)[0], handle=handle))
    assert handle.summary.fallback.startswith("counting of ")


def test_the_backend_that_core_has_set_is_named_by_what_was_chosen(kit):
    nodes = pytest.importorskip("comfy_extras.nodes_model_advanced")
    if not hasattr(nodes, "ModelAttentionBackend"):
        pytest.skip("this ComfyUI has no Model Attention Backend")
    handle = RunHandle()
    kit.sample(kit.lite(nodes.ModelAttentionBackend().patch(kit.model, "pytorch attention")[0], handle=handle))
    assert handle.summary.fallback == "PyTorch's attention"


def test_every_attention_of_comfyui_has_a_display_name():
    own = {name for name in vars(attention) if name.startswith(("attention_", "attention3_"))
           and callable(getattr(attention, name)) and name not in ("attention_basic", "attention_unavailable")}
    assert own <= set(compat._NAMES), own - set(compat._NAMES)


def test_a_faster_dense_attention_is_named_only_where_it_is_there_and_not_in_use(monkeypatch):
    monkeypatch.setattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", True, raising=False)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    assert "Model Attention Backend with comfy kitchen" in compat.faster_dense(None, GPU)
    assert not compat.faster_dense(None, CPU) and not compat.faster_dense(override, GPU)
    monkeypatch.setattr(attention, "optimized_attention", override)
    assert not compat.faster_dense(None, GPU)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    monkeypatch.setattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", False, raising=False)
    assert not compat.faster_dense(None, GPU)
