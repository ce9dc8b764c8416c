"""What the graph being executed says about a node's outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..runtime import MaskChoice, parse_blocks
from ..runtime.config import BlockSet

MODEL_OUTPUT, RUN_OUTPUT = 0, 1
"""Numbers of the node's outputs."""
INPUT = "continue_from"
REPORT, REPORT_MODEL = "LiteAttentionReport", "model"
"""The node that draws masks, and its input for the model."""


def running() -> tuple[str, Mapping] | None:
    """(identity, graph) of the prompt that the server executes now; None without a server."""
    try:
        # Where nobody has imported it, there is none.
        item, = sys.modules["server"].PromptServer.instance.prompt_queue.currently_running.values()
        return item[1], item[2]
    except Exception:  # no server, no such queue, two prompts at once: nobody can say then
        return None


def continues(graph: Mapping[str, Any] | None, node_id: str | None) -> bool | None:
    """Whether the node's `run` leads to a `continue_from`, also through nodes in between (reroutes, switches). None if
    the node is not in this graph."""
    if graph is None or node_id is None or node_id not in graph:
        return None
    return _reached(graph, node_id, RUN_OUTPUT, lambda node, name: name == INPUT) is not None


def wanted_masks(graph: Mapping[str, Any] | None, node_id: str | None) -> MaskChoice | None:
    """Which masks a report on the node's model asks for, or None if there is no report (or no such node)."""
    if graph is None or node_id is None or node_id not in graph:
        return None
    report = _reached(graph, node_id, MODEL_OUTPUT,
                      lambda node, name: node.get("class_type") == REPORT and name == REPORT_MODEL)
    return None if report is None else MaskChoice(*(_blocks(report, name) for name in ("layers", "heads")))


def _blocks(node: Mapping[str, Any], name: str) -> BlockSet:
    """Numbers in a text input; a linked or wrong one is as if it were empty."""
    value = node.get("inputs", {}).get(name)
    try:
        return parse_blocks(value) if isinstance(value, str) else BlockSet()
    except ValueError:
        return BlockSet()


def _reached(graph: Mapping[str, Any], node_id: str, output: int,
             accept: Callable[[Mapping, str], bool]) -> Mapping | None:
    """The first node that an output of `node_id` leads to by an input that is accepted, or None."""
    links = [(source, slot, target, name) for target, node in graph.items()
             for name, value in node.get("inputs", {}).items()
             if isinstance(value, list) and len(value) == 2
             for source, slot in (value,)]
    reached, seen = [node_id], {node_id}
    while reached:
        at = reached.pop()
        for source, slot, target, name in links:
            if source != at or (source == node_id and slot != output):
                continue
            if accept(graph[target], name):
                return graph[target]
            if target not in seen:
                seen.add(target)
                reached.append(target)
    return None
