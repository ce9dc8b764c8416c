"""Shipped workflows: whole graphs, only nodes of core and the pack, no overlaps, files with their addresses."""

import json
import struct
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest

from liteattention.runtime import ErrorBudget, LiteAttentionConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "workflows").glob("*.json"))
PACK = "comfyui-liteattention"
TITLE_PX = 30
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "clip_vision", "checkpoints", "loras",
                 "latent_upscale_models"}
SAMPLERS = {"KSampler", "KSamplerAdvanced", "CFGGuider", "BasicGuider"}
EXPECTED = {"wan2.1_t2v_liteattention", "wan2.1_i2v_liteattention", "wan2.2_14B_t2v_liteattention",
            "wan2.2_14B_t2v_4steps_liteattention", "wan2.2_5B_liteattention", "hunyuanvideo1.5_t2v_liteattention",
            "ltx2_t2v_liteattention", "ltx2.3_two_stages_liteattention", "minimax_h3_t2v_liteattention",
            "liteattention_report_and_compare", "liteattention_tiny_demo"}


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


def test_links_and_slots_name_each_other(graph):
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and graph["last_node_id"] == max(nodes)
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and graph["last_link_id"] == max(links)
    for number, source, slot, target, target_slot, kind in links.values():
        assert nodes[source]["outputs"][slot]["type"] == kind and number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == number
        assert nodes[target]["inputs"][target_slot]["type"] in (kind, "*")
        assert nodes[source]["order"] < nodes[target]["order"]
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot.get("link") is not None]
    starts = [number for node in nodes.values() for slot in node["outputs"] for number in slot["links"]]
    assert sorted(ends) == sorted(starts) == sorted(links)


def test_only_core_nodes_and_nodes_of_the_pack_and_a_note_that_tells(graph):
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and all(word in notes[0] for word in ("# ", "LiteAttention", "run summar"))
    assert not any("`" in note for note in notes), "the frontend's newer nodes show code blue on the note's brown"
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        pack = PACK if node["type"].startswith("LiteAttention") else "comfy-core"
        assert node["properties"]["cnr_id"] == pack and node["properties"]["Node name for S&R"] == node["type"]


def test_nothing_lies_on_top_of_another(graph):
    boxes = {(node["id"], node["type"]): (node["pos"][0], node["pos"][1] - TITLE_PX, node["pos"][0] + node["size"][0],
                                          node["pos"][1] + node["size"][1]) for node in graph["nodes"]}
    groups = {group["title"]: (x, y, x + w, y + h) for group in graph["groups"] for x, y, w, h in [group["bounding"]]}

    def overlap(a, b):
        return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

    assert not [pair for pair in combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])]
    assert not [pair for pair in combinations(groups, 2) if overlap(groups[pair[0]], groups[pair[1]])]
    for key, (left, top, right, bottom) in boxes.items():
        around = [g for g in groups.values() if overlap(g, boxes[key])]
        assert key[1] == "MarkdownNote" or len(around) == 1, key
        assert all(g[0] <= left and g[1] <= top and g[2] >= right and g[3] >= bottom for g in around), key


def test_every_model_file_has_its_address_and_is_in_the_note(graph):
    note = next(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        wanted = {value for value in node["widgets_values"] if isinstance(value, str) and ".safetensors" in value}
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        shipped = {name for name in wanted if (ROOT / "demo" / "model" / name).is_file()}
        assert set(models) == wanted - shipped
        for name, model in models.items():
            assert model["url"].startswith(("https://huggingface.co/Comfy-Org/", "https://huggingface.co/Lightricks/"))
            assert "/resolve/main/" in model["url"] and model["url"].endswith(f"/{name}")
            assert model["directory"] in MODEL_FOLDERS and f"{name}: models/{model['directory']}" in note


def test_the_node_has_the_widgets_of_the_schema_and_is_last_before_the_sampler(graph):
    nodes = {node["id"]: node for node in graph["nodes"]}
    lite = [node for node in graph["nodes"] if node["type"] == "LiteAttention"]
    assert lite
    for node in lite:
        targets = {nodes[link[3]]["type"] for link in graph["links"] if link[1] == node["id"] and link[2] == 0}
        assert targets & SAMPLERS and targets <= SAMPLERS | {"LiteAttentionReport"}
        rule, share, *others = node["widgets_values"]
        assert rule == "error budget", "the default rule, by what people see"
        LiteAttentionConfig(ErrorBudget(share), *others)
        widgets = [slot["widget"]["name"] for slot in node["inputs"] if "widget" in slot]
        settings = [field.name for field in fields(LiteAttentionConfig)]
        assert widgets == [settings[0], "rule.error_budget", *settings[1:]]
        assert len(widgets) == len(node["widgets_values"])


def by_type(name, kind):
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    sources = {(nodes[link[3]]["id"], nodes[link[3]]["inputs"][link[4]]["name"]): nodes[link[1]]
               for link in graph["links"]}
    return [node for node in graph["nodes"] if node["type"] == kind], sources


@pytest.mark.parametrize("name, steps", [("wan2.2_14B_t2v_liteattention", 20),
                                         ("wan2.2_14B_t2v_4steps_liteattention", 4)])
def test_the_low_noise_model_goes_on_with_the_masks_of_the_high_noise_model(name, steps):
    (high, low), sources = by_type(name, "LiteAttention")
    assert sources[low["id"], "continue_from"] is high and (high["id"], "continue_from") not in sources
    (first, second), _ = by_type(name, "KSamplerAdvanced")
    # add_noise, seed, its control, steps, cfg, sampler, scheduler, start, end, leftover noise
    assert first["widgets_values"][3] == second["widgets_values"][3] == steps
    assert first["widgets_values"][7:] == [0, steps // 2, "enable"]
    assert second["widgets_values"][7:] == [steps // 2, steps, "disable"]
    assert first["widgets_values"][0] == "enable" and second["widgets_values"][0] == "disable"
    assert sources[second["id"], "latent_image"]["id"] == first["id"]


def test_the_second_stage_goes_on_with_the_masks_of_the_first_at_twice_its_size():
    name = "ltx2.3_two_stages_liteattention"
    (first, second), sources = by_type(name, "LiteAttention")
    assert sources[second["id"], "continue_from"] is first and (first["id"], "continue_from") not in sources
    guiders, _ = by_type(name, "CFGGuider")
    assert [sources[guider["id"], "model"] for guider in guiders] == [first, second]
    sigmas, _ = by_type(name, "ManualSigmas")
    assert [node["widgets_values"][0].count(",") for node in sigmas] == [8, 3], "steps"
    (latent,), _ = by_type(name, "EmptyLTXVLatentVideo")
    width, height, frames, _ = latent["widgets_values"]
    tokens = (width // 32) * (height // 32) * ((frames - 1) // 8 + 1)
    settings = [node["widgets_values"][5] for node in (first, second)]
    assert 0 < settings[0] < tokens and settings[1] == 0, "the first stage records also on a GPU"


def test_both_videos_of_the_comparison_have_one_seed_and_the_same_settings():
    (dense, lite), sources = by_type("liteattention_report_and_compare", "KSampler")
    assert sources[dense["id"], "seed"] is sources[lite["id"], "seed"]
    assert dense["widgets_values"] == lite["widgets_values"]
    assert sources[dense["id"], "model"]["type"] == "ModelSamplingSD3"
    assert sources[lite["id"], "model"]["type"] == "LiteAttention"
