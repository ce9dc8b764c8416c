"""What the shipped graphs have otherwise than ComfyUI's own templates of today: python tools/templates.py

Compares model files, sizes, steps, cfg, samplers, shifts and node types with the installed comfyui-workflow-templates
(`pip install --upgrade comfyui-workflow-templates` for the newest) and ends with 1 where something has drifted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from workflow_files import INPUT, OUTPUT, inner_nodes, levels, widget_values  # noqa: E402

MADE_FROM = (0, 11, 41)
"""Version of comfyui-workflow-templates that the graphs follow; an older one has other templates."""
BYPASSED = 4
OWN = {"text", "prompt", "seed", "noise_seed", "filename_prefix", "format", "codec", "image", "device", "bit_depth"}
"""Widgets whose values are the graph's own, or the machine's."""
OWN_TYPES = {"MarkdownNote", "Note", "PrimitiveStringMultiline", "LiteAttention", "LiteAttentionReport",
             "LiteAttentionCompare"}


class Origin(NamedTuple):
    """A graph's template, node types of it that the graph leaves out, and core nodes that the graph has added."""

    template: str
    left_out: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()


IMAGE_BRANCH = {"EmptyImage", "LTXVImgToVideoInplace", "LTXVPreprocess", "LTXVCropGuides", "ResizeImageMaskNode",
                "ResizeImagesByLongerEdge"}
PROMPT_WRITER = {"TextGenerateLTX2Prompt", "LoraLoader", "ComfySwitchNode", "PrimitiveBoolean", "PreviewAny"}
TEMPLATES = {
    "wan2.1_1.3B_t2v_liteattention": Origin("text_to_video_wan"),
    "wan2.2_14B_t2v_liteattention": Origin("video_wan2_2_14B_t2v"),
    "wan2.2_14B_i2v_liteattention": Origin("video_wan2_2_14B_i2v"),
    "wan2.2_5B_liteattention": Origin("video_wan2_2_5B_ti2v"),
    "hunyuanvideo1.5_t2v_liteattention": Origin("video_hunyuan_video_1.5_720p_t2v"),
    "ltx2.3_two_stages_liteattention": Origin(
        "video_ltx2_3_t2v", frozenset(IMAGE_BRANCH | PROMPT_WRITER | {"Reroute"})),
    "minimax_h3_t2v_liteattention": Origin("video_minimax_h3_t2v"),
    "liteattention_report_and_compare": Origin(
        "text_to_video_wan", frozenset({"CreateVideo", "SaveVideo"}), frozenset({"PrimitiveInt"})),
}


def installed() -> tuple[int, ...]:
    """Version of comfyui-workflow-templates.

    Raises:
        PackageNotFoundError: there is none.
    """
    return tuple(int(part) for part in version("comfyui-workflow-templates").split(".")[:3])


def shipped(name: str) -> dict:
    """A graph of this pack."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def official(name: str) -> dict:
    """A template of the installed package.

    Raises:
        FileNotFoundError: it has none of this name.
    """
    from comfyui_workflow_templates import get_asset_path

    try:
        return json.loads(Path(get_asset_path(name, f"{name}.json")).read_text(encoding="utf-8"))
    except KeyError as error:
        raise FileNotFoundError(name) from error


def settings(workflow: dict, names: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(type, its settings as text) of every active node; values that a link or a subgraph's node gives are followed.

    Args:
        names: of the widgets of each type.
    """
    shown = {}  # subgraph: what stands on its node, by number of the input
    for level in levels(workflow)[1:]:
        node = next((node for node in workflow["nodes"] if node["type"] == level.id), {})
        ends = {link.slot: (link.target, link.target_slot) for link in reversed(level.links) if link.source == INPUT}
        nodes = {inner["id"]: inner for inner in level.nodes}
        widgets = [number for number, (target, slot) in sorted(ends.items())
                   if target != OUTPUT and "widget" in nodes[target]["inputs"][slot]]
        values = node.get("widgets_values") or []
        outside = {slot["name"] for slot in node.get("inputs", ()) if slot.get("link") is not None}
        shown[level.id] = {number: None if level.inputs[number]["name"] in outside else value
                           for number, value in zip(widgets, values, strict=False)}
    for level in levels(workflow):
        links = {link.number: link for link in level.links}
        for node in level.nodes:
            if node["type"] not in names or node.get("mode", 0) == BYPASSED:
                continue
            values = widget_values(node, names[node["type"]])
            for slot in node["inputs"]:
                link = links.get(slot.get("link"))
                if link and slot["name"] in values:
                    given = shown[level.id] if link.source == INPUT else {link.slot: None}
                    values[slot["name"]] = given.get(link.slot, values[slot["name"]])
            yield node["type"], ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                                          for name, value in values.items()
                                          if name not in OWN and value not in (None, "")) or "there"


def drift(name: str) -> list[str]:
    """A line for every setting and node type that a graph and its template do not share."""
    origin, graph = TEMPLATES[name], shipped(name)
    try:
        template = official(origin.template)
    except FileNotFoundError:
        return [f"the template {origin.template} is gone"]
    names = {node["type"]: [] for node in inner_nodes(template) if node["type"] not in OWN_TYPES}
    for node in inner_nodes(graph):
        if node["type"] not in OWN_TYPES:
            names[node["type"]] = list(widget_values(node))
    ours, theirs = (set(settings(workflow, names)) for workflow in (graph, template))
    return [*(f"template {kind}: {text}" for kind, text in sorted(theirs - ours) if kind not in origin.left_out),
            *(f"graph    {kind}: {text}" for kind, text in sorted(ours - theirs) if kind not in origin.added)]


def main() -> int:
    old = ", older than what the graphs follow" if installed() < MADE_FROM else ""
    print(f"comfyui-workflow-templates {version('comfyui-workflow-templates')}{old}")
    found = {name: drift(name) for name in TEMPLATES}
    for name, lines in found.items():
        print(f"{name}, {TEMPLATES[name].template}: {'the same' if not lines else ''}")
        for line in lines:
            print(f"  {line}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
