"""What the graph being executed says about a node's outputs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

RUN_OUTPUT = 1
"""Number of the node's `run` output."""
INPUT = "continue_from"


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
    links = [(source, slot, target, name) for target, node in graph.items()
             for name, value in node.get("inputs", {}).items()
             if isinstance(value, list) and len(value) == 2
             for source, slot in (value,)]
    reached, seen = [node_id], {node_id}
    while reached:
        at = reached.pop()
        for source, slot, target, name in links:
            if source != at or (source == node_id and slot != RUN_OUTPUT):
                continue
            if name == INPUT:
                return True
            if target not in seen:
                seen.add(target)
                reached.append(target)
    return False
