"""Workflow files as the frontend saves them, with everything in their subgraphs."""

from __future__ import annotations

from typing import Any, NamedTuple

INPUT, OUTPUT = -10, -20
"""The ends of a subgraph, where links of its nodes have a node's number."""
CONTROLLED = {"seed", "noise_seed"}
"""Widgets with a second value behind theirs: what becomes of the number after a run."""


class Link(NamedTuple):
    number: int
    source: int
    slot: int
    target: int
    target_slot: int
    type: str


class Level(NamedTuple):
    """The graph itself, or one subgraph."""

    id: str
    nodes: list[dict]
    links: list[Link]
    groups: list[dict]
    inputs: list[dict]
    outputs: list[dict]


def levels(workflow: dict) -> list[Level]:
    """The graph, then its subgraphs."""
    found = [Level(workflow.get("id", ""), workflow["nodes"], [Link(*link) for link in workflow["links"]],
                   workflow["groups"], [], [])]
    for sub in (workflow.get("definitions") or {}).get("subgraphs", ()):
        links = [Link(link["id"], link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"],
                      link["type"]) for link in sub["links"]]
        found.append(Level(sub["id"], sub["nodes"], links, sub["groups"], sub["inputs"], sub["outputs"]))
    return found


def inner_nodes(workflow: dict) -> list[dict]:
    """Nodes of every level, but not those that stand for a subgraph."""
    found = levels(workflow)
    subgraphs = {level.id for level in found}
    return [node for level in found for node in level.nodes if node["type"] not in subgraphs]


def widget_values(node: dict, names: list[str] | None = None) -> dict[str, Any]:
    """A node's widgets by name, without what becomes of a number after a run.

    Args:
        names: of its widgets; the node itself names all of its own where a frontend from 2025 on has saved it.
    """
    if names is None:
        names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    values, found = iter(node.get("widgets_values") or ()), {}
    for name in names:
        found[name] = next(values, None)
        if name in CONTROLLED or node["type"] == "PrimitiveInt":
            next(values, None)
    return found
