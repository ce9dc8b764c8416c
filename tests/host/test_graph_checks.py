"""Graphs in which a LiteAttention node does nothing, and two copies of the pack."""

import asyncio
import logging
import sys
import types

import pytest

from liteattention.host import graph_checks, progress
from liteattention.host.graph_checks import NOT_SAMPLED_NOTE, REPLACED_NOTE, unsampled
from liteattention.nodes import LiteAttentionExtension

OUTPUTS = {"Loader": ["MODEL"], "LiteAttention": ["MODEL", "LITEATTENTION_RUN"], "LiteAttentionReport": ["LATENT"],
           "Lora": ["MODEL", "CLIP"], "KSampler": ["LATENT"], "BasicScheduler": ["SIGMAS"], "CFGGuider": ["GUIDER"],
           "SamplerCustomAdvanced": ["LATENT", "LATENT"], "Efficient": ["MODEL", "CLIP", "LATENT"], "Switch": ["*"],
           "SaveModel": [], "Pipe": ["PIPE_LINE", "MODEL"], "Info": ["STRING"]}


def prompt(*nodes):
    """(id, class, ids of nodes whose first output it reads, or [id, output])."""
    return {node_id: {"class_type": kind, "inputs": {f"in{i}": [link, 0] if isinstance(link, str) else link
                                                     for i, link in enumerate(links)} | {"steps": 20}}
            for node_id, kind, *links in (("1", "Loader"), *nodes)}


LITE = ("2", "LiteAttention", "1")


@pytest.mark.parametrize("nodes, found", [
    ([LITE, ("3", "KSampler", "2")], {}),
    ([LITE, ("3", "KSampler", "1")], {"2": NOT_SAMPLED_NOTE}),
    ([LITE, ("3", "KSampler", ["2", [0]], ["a", "b"])], {"2": NOT_SAMPLED_NOTE}),  # values that are no links
    ([LITE, ("3", "Lora", "2"), ("4", "KSampler", ["3", 0])], {}),
    ([LITE, ("3", "Lora", "2"), ("4", "Lora", ["3", 1])], {"2": NOT_SAMPLED_NOTE}),
    ([LITE, ("3", "KSampler", "1"), ("4", "LiteAttentionReport", "2", "3")], {"2": NOT_SAMPLED_NOTE}),
    ([LITE, ("3", "BasicScheduler", "2"), ("4", "SaveModel", "2")], {"2": NOT_SAMPLED_NOTE}),
    ([LITE, ("3", "CFGGuider", "2"), ("4", "SamplerCustomAdvanced", "3")], {}),
    ([LITE, ("3", "CFGGuider", "2")], {"2": NOT_SAMPLED_NOTE}),
    ([LITE, ("3", "Efficient", "2")], {}),
    ([LITE, ("3", "LiteAttention", "2"), ("4", "KSampler", "3")], {"2": REPLACED_NOTE}),
    ([LITE, ("3", "Lora", "2"), ("4", "LiteAttention", "3"), ("5", "KSampler", "4")], {"2": REPLACED_NOTE}),
    ([LITE, ("3", "LiteAttention", "2"), ("4", "KSampler", "3"), ("5", "KSampler", "2")], {}),
    ([LITE, ("3", "LiteAttention", "1", ["2", 1]), ("4", "KSampler", "3")], {"2": NOT_SAMPLED_NOTE}),
    ([LITE, ("3", "Info", "2")], {"2": NOT_SAMPLED_NOTE}),
    # Unknown classes, switches and pipes could lead to a sampler.
    ([LITE, ("3", "OfAnotherPack", "2")], {}), ([LITE, ("3", "Switch", "2")], {}), ([LITE, ("3", "Pipe", "2")], {}),
    ([("3:5", "LiteAttention", "1"), ("3:6", "Lora", "3:5"), ("3:5b", "Lora", "3:6")], {"3:5": NOT_SAMPLED_NOTE}),
])
def test_nodes_that_no_sampler_uses_are_found(nodes, found):
    assert unsampled(prompt(*nodes), OUTPUTS.get) == found


@pytest.fixture
def server(monkeypatch):
    running = types.SimpleNamespace(handlers=[], shown=[])
    running.add_on_prompt_handler = running.handlers.append
    monkeypatch.setitem(sys.modules, "server",
                        types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=running)))
    monkeypatch.setattr(graph_checks.progress, "show", lambda *args: running.shown.append(args))
    return running


def test_a_queued_prompt_is_looked_at_and_goes_on_as_it_is(server, caplog):
    graph_checks.watch_prompts()
    handler, = server.handlers
    request = {"prompt": prompt(LITE, ("3", "KSampler", "1")), "client_id": "window",
               "extra_data": {"extra_pnginfo": {"workflow": {"id": "w"}}}}
    assert handler(request) is request and server.shown == [("2", [NOT_SAMPLED_NOTE], "w", "window")]
    assert f"node 2: {NOT_SAMPLED_NOTE}" in caplog.text
    for other in ({}, {"prompt": {"1": {}, "2": {"class_type": "LiteAttention", "inputs": None}}}, {"prompt": "x"}):
        assert handler(other) is other
    assert len(server.shown) == 1 and progress.workflow_id({"extra_pnginfo": None}) is None


@pytest.mark.parametrize("other, warned", [("custom_nodes.ComfyUI-LiteAttention-old", True), (None, False)])
def test_a_second_copy_is_said_when_it_is_loaded(server, monkeypatch, caplog, other, warned):
    loaded = {"LiteAttention": types.SimpleNamespace(RELATIVE_PYTHON_MODULE=other)} if other else {}
    monkeypatch.setitem(sys.modules, "nodes", types.SimpleNamespace(NODE_CLASS_MAPPINGS=loaded))
    with caplog.at_level(logging.WARNING):
        asyncio.run(LiteAttentionExtension().on_load())
    assert (graph_checks.TWICE_NOTE in caplog.text) is warned and len(server.handlers) == 1
    assert not warned or "ComfyUI-LiteAttention-old" in caplog.text
