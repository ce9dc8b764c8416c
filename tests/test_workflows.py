"""Shipped workflows: whole graphs, only nodes of core and the pack, no overlaps, files with their addresses."""

import json
import struct
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest

from liteattention.runtime import ErrorBudget, LiteAttentionConfig
from liteattention.tools import templates
from liteattention.tools.screenshots import CARDS
from liteattention.tools.templates import TEMPLATES, drift
from liteattention.tools.workflow_files import INPUT, OUTPUT, inner_nodes, levels, widget_values

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "workflows").glob("*.json"))
PACK = "comfyui-liteattention"
TITLE_PX = 30
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "clip_vision", "checkpoints", "loras",
                 "latent_upscale_models"}
SAMPLERS = {"KSampler", "KSamplerAdvanced", "CFGGuider", "BasicGuider"}
DEMO = "demo_liteattention"
EXPECTED = {DEMO, "wan2.1_1.3B_t2v_liteattention", "wan2.2_14B_t2v_liteattention", "wan2.2_14B_i2v_liteattention",
            "wan2.2_5B_liteattention", "hunyuanvideo1.5_t2v_liteattention", "ltx2.3_two_stages_liteattention",
            "minimax_h3_t2v_liteattention", "liteattention_report_and_compare"}
WINDOW, FIT, MARGIN = (1600, 857), 0.75, 10
"""The frontend fits a graph's nodes, each with a margin, into this share of its canvas."""
READABLE = 8 / 14
"""Below this scale the frontend's default renderer draws no text: it would be smaller than 8 pixels."""


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def path(request):
    return request.param


@pytest.fixture
def graph(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_are_there_each_with_a_thumbnail():
    assert {path.stem for path in FILES} == EXPECTED
    assert {path.stem for path in (ROOT / "workflows").glob("*.jpg")} == EXPECTED


def test_the_thumbnail_is_a_small_jpeg(path):
    data = path.with_suffix(".jpg").read_bytes()
    assert data[:3] == b"\xff\xd8\xff" and len(data) < 40 * 1024
    at = 2
    while data[at + 1] not in (0xC0, 0xC2):  # segments up to the frame header
        at += 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
    height, width = struct.unpack(">HH", data[at + 5:at + 9])
    assert 350 <= width <= 500 and height >= 100


def test_the_thumbnail_draws_the_steps_of_the_graph(path, graph):
    steps = {widget_values(node)["steps"] for node in inner_nodes(graph)
             if node["type"] in ("KSampler", "BasicScheduler")}
    drawn = {sum(steps for steps, _ in run) for run in CARDS[path.stem][2]}
    assert CARDS.keys() == EXPECTED and (drawn == steps or not drawn or not steps)


def test_links_and_slots_name_each_other(graph):
    numbers = [node["id"] for level in levels(graph) for node in level.nodes]
    assert len(numbers) == len(set(numbers)) and graph["last_node_id"] == max(numbers)
    numbers = [link.number for level in levels(graph) for link in level.links]
    assert len(numbers) == len(set(numbers)) and graph["last_link_id"] == max(numbers)
    for level in levels(graph):
        nodes = {node["id"]: node for node in level.nodes}
        for link in level.links:
            source = level.inputs[link.slot] if link.source == INPUT else nodes[link.source]["outputs"][link.slot]
            assert source["type"] == link.type
            assert link.number in (source["linkIds"] if link.source == INPUT else source["links"])
            if link.target == OUTPUT:
                assert level.outputs[link.target_slot]["linkIds"] == [link.number]
                continue
            slot = nodes[link.target]["inputs"][link.target_slot]
            assert slot["link"] == link.number and (slot["type"] == "*" or link.type in slot["type"].split(","))
            assert link.source == INPUT or nodes[link.source]["order"] < nodes[link.target]["order"]
        ends = [slot["link"] for node in level.nodes for slot in node["inputs"] if slot["link"] is not None]
        assert sorted(ends) == sorted(link.number for link in level.links if link.target != OUTPUT)
        starts = [number for node in level.nodes for slot in node["outputs"] for number in slot["links"]]
        assert sorted(starts) == sorted(link.number for link in level.links if link.source != INPUT)


def test_a_subgraph_shows_the_values_that_are_inside(graph):
    """Older frontends read the values of the nodes in it, newer ones those that stand on it."""
    inside = {level.id: level for level in levels(graph)[1:]}
    shown = [node for node in graph["nodes"] if node["type"] in inside]
    assert len(shown) == len(inside)
    for node in shown:
        level = inside[node["type"]]
        assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in level.inputs]
        assert [slot["name"] for slot in node["outputs"]] == [slot["name"] for slot in level.outputs]
        values = iter(node["widgets_values"])
        for number, slot in enumerate(node["inputs"]):
            if "widget" not in slot:
                continue
            value = next(values)
            for link in (link for link in level.links if (link.source, link.slot) == (INPUT, number)):
                target = next(node for node in level.nodes if node["id"] == link.target)
                assert widget_values(target)[target["inputs"][link.target_slot]["name"]] == value, slot["name"]
        assert next(values, None) is None


def test_only_core_nodes_and_nodes_of_the_pack_and_a_note_that_tells(graph):
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and all(word in notes[0] for word in ("# ", "LiteAttention", "run summar"))
    assert not any("`" in note for note in notes), "the frontend's newer nodes show code blue on the note's brown"
    for node in inner_nodes(graph):
        if node["type"] == "MarkdownNote":
            continue
        pack = PACK if node["type"].startswith("LiteAttention") else "comfy-core"
        assert node["properties"]["cnr_id"] == pack and node["properties"]["Node name for S&R"] == node["type"]


def box(node):
    """Left, top with the title, right, bottom."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE_PX, left + width, top + height


def test_nothing_lies_on_top_of_another(graph):
    def overlap(a, b):
        return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

    for level in levels(graph):
        boxes = {(node["id"], node["type"]): box(node) for node in level.nodes}
        groups = {group["title"]: (x, y, x + w, y + h) for group in level.groups for x, y, w, h in [group["bounding"]]}
        assert not [pair for pair in combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])]
        assert not [pair for pair in combinations(groups, 2) if overlap(groups[pair[0]], groups[pair[1]])]
        for key, (left, top, right, bottom) in boxes.items():
            around = [g for g in groups.values() if overlap(g, boxes[key])]
            assert key[1] == "MarkdownNote" or len(around) == min(1, len(groups)), key
            assert all(g[0] <= left and g[1] <= top and g[2] >= right and g[3] >= bottom for g in around), key


def test_it_opens_readable(graph):
    left, top, right, bottom = (f(values) for f, values in zip(
        (min, min, max, max), zip(*map(box, graph["nodes"]), strict=True), strict=True))
    scale = FIT * min(WINDOW[0] / (right - left + 2 * MARGIN), WINDOW[1] / (bottom - top + 2 * MARGIN))
    assert scale > READABLE, scale


def test_every_model_file_has_its_address_and_is_in_the_note(graph):
    note = next(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    for node in inner_nodes(graph):
        if node["type"] == "MarkdownNote":
            continue
        wanted = {value for value in node["widgets_values"] if isinstance(value, str) and ".safetensors" in value}
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        assert set(models) == wanted
        for name, model in models.items():
            assert model["url"].startswith(("https://huggingface.co/Comfy-Org/", "https://huggingface.co/Lightricks/"))
            assert "/resolve/main/" in model["url"] and model["url"].endswith(f"/{name}")
            assert model["directory"] in MODEL_FOLDERS and f"{name}: models/{model['directory']}" in note


def test_the_node_has_the_widgets_of_the_schema_and_is_last_before_the_sampler(graph):
    assert any(node["type"] == "LiteAttention" for node in inner_nodes(graph))
    for level in levels(graph):
        nodes = {node["id"]: node for node in level.nodes}
        for node in (node for node in level.nodes if node["type"] == "LiteAttention"):
            targets = {nodes[link.target]["type"] for link in level.links
                       if (link.source, link.slot) == (node["id"], 0)}
            assert targets & SAMPLERS and targets <= SAMPLERS | {"LiteAttentionReport"}
            rule, share, *others = node["widgets_values"]
            assert (rule, share) == ("error budget", 0.3), "the defaults"
            LiteAttentionConfig(ErrorBudget(share), *others)
            settings = [field.name for field in fields(LiteAttentionConfig)]
            assert list(widget_values(node)) == [settings[0], "rule.error_budget", *settings[1:]]


def by_type(name, kind):
    """Nodes of a type, and the node behind each (node, input), in the one level where they are."""
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    level = next(level for level in levels(graph) if any(node["type"] == kind for node in level.nodes))
    nodes = {node["id"]: node for node in level.nodes}
    sources = {(link.target, nodes[link.target]["inputs"][link.target_slot]["name"]): nodes[link.source]
               for link in level.links if link.source != INPUT and link.target != OUTPUT}
    return [node for node in level.nodes if node["type"] == kind], sources


@pytest.mark.parametrize("name", ["wan2.2_14B_t2v_liteattention", "wan2.2_14B_i2v_liteattention"])
@pytest.mark.parametrize("switch, steps, split, cfg", [("on_false", 20, 10, 3.5), ("on_true", 4, 2, 1)])
def test_the_low_noise_model_goes_on_with_the_masks_of_the_high_noise_model(name, switch, steps, split, cfg):
    (a, b), sources = by_type(name, "LiteAttention")
    high, low = (a, b) if "high" in a["title"] else (b, a)
    assert sources[low["id"], "continue_from"] is high and (high["id"], "continue_from") not in sources
    samplers, _ = by_type(name, "KSamplerAdvanced")
    first, second = (next(node for node in samplers if sources[node["id"], "model"]["id"] == lite["id"])
                     for lite in (high, low))
    assert sources[second["id"], "latent_image"]["id"] == first["id"]

    def chosen(node, slot):
        return widget_values(sources[sources[node["id"], slot]["id"], switch])["value"]

    for node in (first, second):
        assert (chosen(node, "steps"), chosen(node, "cfg")) == (steps, cfg)
    assert chosen(first, "end_at_step") == chosen(second, "start_at_step") == split
    assert (widget_values(first)["start_at_step"], chosen(second, "end_at_step")) == (0, steps)
    assert [widget_values(node)[option] for node in (first, second)
            for option in ("add_noise", "return_with_leftover_noise")] == ["enable", "enable", "disable", "disable"]


def test_the_second_stage_goes_on_with_the_masks_of_the_first_at_twice_its_size():
    name = "ltx2.3_two_stages_liteattention"
    (a, b), sources = by_type(name, "LiteAttention")
    first, second = (a, b) if "first" in a["title"] else (b, a)
    assert sources[second["id"], "continue_from"] is first and (first["id"], "continue_from") not in sources
    guiders, _ = by_type(name, "CFGGuider")
    sigmas, _ = by_type(name, "ManualSigmas")
    samplers, _ = by_type(name, "SamplerCustomAdvanced")
    steps = {sources[sources[node["id"], "guider"]["id"], "model"]["id"]:
             sources[node["id"], "sigmas"]["widgets_values"][0].count(",") for node in samplers}
    assert len(guiders) == len(sigmas) == 2 and steps == {first["id"]: 8, second["id"]: 3}
    size = {node["title"]: node["widgets_values"][0] for node in by_type(name, "PrimitiveInt")[0]}
    tokens = (size["Width"] // 64) * (size["Height"] // 64) * (size["Seconds"] * size["Frames per second"] // 8 + 1)
    settings = [widget_values(node)["min_tokens"] for node in (first, second)]
    assert 0 < settings[0] < tokens and settings[1] == 0, "the first stage records also on a GPU"


def test_both_videos_of_the_comparison_have_one_seed_and_the_same_settings():
    samplers, sources = by_type("liteattention_report_and_compare", "KSampler")
    dense, lite = sorted(samplers, key=lambda node: node["title"])
    assert sources[dense["id"], "seed"] is sources[lite["id"], "seed"]
    assert dense["widgets_values"] == lite["widgets_values"]
    model = sources[dense["id"], "model"]
    assert model["title"].startswith("Wan") and sources[lite["id"], "model"]["type"] == "LiteAttention"


def test_both_clips_of_the_demo_have_one_seed_and_the_same_settings():
    graph = json.loads((ROOT / "workflows" / f"{DEMO}.json").read_text(encoding="utf-8"))
    dense, lite = (widget_values(node) for node in inner_nodes(graph) if node["type"] == "KSampler")
    assert dense == lite


def test_the_demo_is_first_where_names_decide():
    """On Windows, and where the template browser sorts from A to Z, which has names with a digit in front last."""
    assert min(EXPECTED, key=str.casefold) == DEMO


@pytest.fixture
def official_templates():
    pytest.importorskip("comfyui_workflow_templates")
    if templates.installed() < templates.MADE_FROM:
        pytest.skip("comfyui-workflow-templates is older than what the graphs follow")


def test_what_the_official_templates_have_is_what_the_graphs_have(official_templates):
    for name in TEMPLATES:
        assert not drift(name), "python tools/templates.py prints it, too"
    assert TEMPLATES.keys() == EXPECTED - {DEMO}


def test_drift_is_seen(official_templates, monkeypatch):
    name = "wan2.2_14B_i2v_liteattention"
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in inner_nodes(graph):
        if node["type"] == "ModelSamplingSD3":
            node["widgets_values"] = [8]
    shown = next(node for node in graph["nodes"] if "widgets_values" in node and 640 in node["widgets_values"])
    values = (720 if value == 640 else value for value in shown["widgets_values"])
    shown["widgets_values"] = [value.replace("fp8", "fp16") if isinstance(value, str) else value for value in values]
    monkeypatch.setattr(templates, "shipped", lambda _: graph)
    said = "\n".join(drift(name))
    assert all(part in said for part in ("ModelSamplingSD3", "shift 5", "fp16", "fp8", "width 640"))
