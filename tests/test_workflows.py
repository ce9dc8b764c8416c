"""Shipped workflows: whole graphs, only core nodes and ours, our widgets in the order of the schema."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from liteattention.runtime import LiteAttentionConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_graph_is_whole(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, source, slot, target, target_slot, kind in graph["links"]:
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][target_slot]["type"] in (kind, "*")
    types = [node["type"] for node in graph["nodes"]]
    assert types.count("LiteAttention") == 1
    ours = next(node for node in graph["nodes"] if node["type"] == "LiteAttention")
    threshold, *others = ours["widgets_values"]
    config = LiteAttentionConfig(float(threshold), *others)
    widgets = [slot["widget"]["name"] for slot in ours["inputs"] if "widget" in slot]
    assert widgets == [field.name for field in fields(config)] and len(ours["widgets_values"]) == len(widgets)
    model, = (link for link in graph["links"] if link[3] == ours["id"])
    sampler, = (link for link in graph["links"] if link[1] == ours["id"])
    assert "Sampling" in nodes[model[1]]["type"] and "Sampler" in nodes[sampler[3]]["type"], "last before the sampler"


def test_there_is_one():
    assert FILES
