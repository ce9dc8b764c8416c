"""The pack as a user has it: a real server, prompts over its HTTP API."""

import copy
import json
import re
import time

import pytest
from comfyui import find_comfyui
from safetensors.torch import load_file

from liteattention.tools.server import ROOT, ComfyServer, PromptFailed
from liteattention.tools.workflow_files import inner_nodes

COMFY = find_comfyui()
COMFY_MODELS = {path.name for path in (COMFY / "comfy" / "ldm").iterdir()}
EXPECTED_INPUTS = {
    # id: (type, default, further options)
    "model": ("MODEL", None, {}),
    "rule": ("COMFY_DYNAMICCOMBO_V3", None, {}),
    "warmup_steps": ("INT", 2, {"min": 0, "max": 100}),
    "dense_end_steps": ("INT", 0, {"min": 0, "max": 100, "advanced": True}),
    "dense_blocks": ("STRING", "", {"advanced": True}),
    "min_tokens": ("INT", 0, {"min": 0, "advanced": True}),
    "precision": ("COMBO", "auto", {"advanced": True, "options": ["auto", "full", "int8"]}),
    "pool_skipped": ("BOOLEAN", True, {"advanced": True}),
    "continue_from": ("LITEATTENTION_RUN", None, {}),
}
EXPECTED_RULES = {
    "error budget": ("error_budget", 0.3, {"min": 0.01, "max": 1.0, "step": 0.01}),
    "threshold": ("threshold", -10.0, {"min": -30.0, "max": 0.0, "step": 0.5}),
}
NODES = {"LiteAttention", "LiteAttentionReport", "LiteAttentionCompare", "LiteAttentionRaylight",
         "LiteAttentionRaylightReport",
         "LiteAttentionDemoModel", "LiteAttentionDemoPrompt", "LiteAttentionDemoDecode"}


@pytest.fixture(scope="module")
def server():
    with ComfyServer(COMFY, environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture
def prompt():
    """The demo's workflow, smaller: 4 steps at 5 x 16 x 16, 320 tokens, at a threshold where tiles drop."""
    workflow = json.loads((ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    del workflow["3"]["inputs"]["rule.error_budget"]
    workflow["3"]["inputs"] |= {"rule": "threshold", "rule.threshold": -0.5, "warmup_steps": 1, "min_tokens": 128}
    workflow["5"]["inputs"] |= {"width": 128, "height": 128, "length": 17}
    workflow["6"]["inputs"]["steps"] = 4
    return workflow


def loaded(server):
    """Whether the log lists the pack among the imported ones; ComfyUI's own extras may lack a dependency."""
    mentions = [line for line in server.log().splitlines() if "LiteAttention" in line]
    complaints = ("FAILED", "Cannot import", "  File ", "WARNING", "ERROR")
    return bool(mentions) and not any(word in line for line in mentions for word in complaints)


def without_node(prompt):
    plain = copy.deepcopy(prompt)
    plain["6"]["inputs"]["model"] = plain.pop("3")["inputs"]["model"]
    return plain


def latent(server, prompt, seed=None):
    """Queue with outputs that no cache can answer; the saved latent."""
    prompt = copy.deepcopy(prompt)
    latent.runs = getattr(latent, "runs", 0) + 1
    prompt["7"]["inputs"]["filename_prefix"] = f"test{latent.runs}"
    if seed is not None:
        prompt["6"]["inputs"]["seed"] = seed
    outputs = server.run(prompt, timeout_s=120)
    if "9" in outputs:
        picture, = outputs["9"]["images"]
        assert server.output_file(picture).stat().st_size > 0
    return load_file(server.output_file(outputs["7"]["latents"][0]))["latent_tensor"]


def test_the_pack_loads_without_a_word_of_complaint(server):
    assert loaded(server)


def test_the_node_is_what_saved_workflows_expect(server):
    node = server.get("/object_info/LiteAttention")["LiteAttention"]
    assert node["category"] == "model/patch" and node["output"] == ["MODEL", "LITEATTENTION_RUN"]
    assert node["output_name"] == ["model", "run"]
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    assert list(inputs) == list(EXPECTED_INPUTS)
    for name, (kind, default, options) in EXPECTED_INPUTS.items():
        found_kind, found = inputs[name]
        assert found_kind == kind and found.get("default") == default, name
        assert {k: found.get(k) for k in options} == options, name
        assert len(found["tooltip"]) > 40, name
    rules = inputs["rule"][1]["options"]
    assert [rule["key"] for rule in rules] == list(EXPECTED_RULES), "the first one is the default"
    for rule in rules:
        name, default, options = EXPECTED_RULES[rule["key"]]
        (found_name, (kind, found)), = rule["inputs"]["required"].items()
        assert (found_name, kind, found["default"]) == (name, "FLOAT", default)
        assert {k: found[k] for k in options} == options and len(found["tooltip"]) > 40
    aliases = {"sparse attention", "skip attention", "speed up", "accelerate", "optimize", "wan speed"}
    assert aliases <= set(node["search_aliases"])


def test_every_input_of_every_node_is_explained_on_the_node_and_on_its_page(server):
    known = server.get("/object_info")
    assert NODES == {name for name in known if name.startswith("LiteAttention")}
    for name in NODES:
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {known[name]['display_name']}\n") and len(known[name]["description"]) > 40
        assert all(known[name]["output_tooltips"]), name
        pictures = re.findall(r"!\[.+\]\((\w+\.jpg)\)", page)
        assert pictures and all((ROOT / "web" / "docs" / picture).is_file() for picture in pictures), name
        inputs = {**known[name]["input"].get("required", {}), **known[name]["input"].get("optional", {})}
        for key, (_, options) in inputs.items():
            assert len(options["tooltip"]) > 15 and (f"**{key}**" in page or f"`{key}`" in page or key == "model"), key


def test_tooltips_name_the_defaults_that_are_there(server):
    """Help text and number are edited in two places."""
    node = server.get("/object_info/LiteAttention")["LiteAttention"]
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    named = {name: re.findall(r"(-?[\d.]*\d): the default", options["tooltip"])
             for name, (_, options) in inputs.items()}
    assert not any(named.values())
    for rule in inputs["rule"][1]["options"]:
        (_, (_, options)), = rule["inputs"]["required"].items()
        assert re.findall(r"(-?[\d.]*\d): the (?:default|paper's)", options["tooltip"]) == [f"{options['default']:g}"]
    assert "never more than a quarter" in inputs["warmup_steps"][1]["tooltip"].lower()
    from liteattention.runtime.schedule import FEW_STEPS
    assert f"1 in runs of up to {FEW_STEPS} steps" in inputs["warmup_steps"][1]["tooltip"]
    from liteattention.kernels.precision import AUTO_INT8_MIN_TOKENS
    from liteattention.runtime.reasons import AUTO_MIN_TOKENS, AUTO_MIN_TOKENS_DEFAULT

    said = re.findall(r"(\d+) on a (CPU|GPU)", inputs["min_tokens"][1]["tooltip"])
    assert f"{AUTO_INT8_MIN_TOKENS} tokens" in inputs["precision"][1]["tooltip"]
    assert said == [(str(AUTO_MIN_TOKENS["cpu"]), "CPU"), (str(AUTO_MIN_TOKENS_DEFAULT), "GPU")]


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_workflows_use_nodes_that_are_there(server, path):
    known = server.get("/object_info")
    missing = {node["type"] for node in inner_nodes(json.loads(path.read_text(encoding="utf-8")))} - set(known)
    if "MiniMaxH3ImageToVideo" in missing and "minimax" not in COMFY_MODELS:
        pytest.skip("this ComfyUI has no MiniMax H3")
    assert missing <= {"MarkdownNote"}, "a node of the frontend alone"


def test_the_template_browser_lists_them(server):
    listed = server.get("/workflow_templates")
    assert any("wan2.2_14B_t2v_liteattention" in names for names in listed.values()), listed


def test_a_prompt_skips_tiles_and_tells(server, prompt):
    latent(server, prompt, seed=11)
    summary = server.summaries()[-1]
    assert summary["sparse_calls"] == 20 and summary["dense_calls"] == {"cross-attention": 20}
    assert summary["skipped_per_step"][0] == 0 and summary["skipped_per_step"][-1] > 0
    assert "20 of 20 calls sparse" in server.log()


def test_bypassed_and_all_dense_give_the_bytes_of_a_graph_without_the_node(server, prompt):
    plain = latent(server, without_node(prompt), seed=12)
    dense = copy.deepcopy(prompt)
    dense["3"]["inputs"]["dense_blocks"] = "0--1"
    assert plain.equal(latent(server, dense, seed=12))
    assert not plain.equal(latent(server, prompt, seed=12))
    assert plain.equal(latent(server, without_node(prompt), seed=12)), "the model in the cache was not touched"


def test_prompts_in_a_row_are_each_as_if_alone(server, prompt):
    alone = {seed: latent(server, prompt, seed) for seed in (21, 22)}
    other = copy.deepcopy(prompt)
    other["5"]["inputs"]["width"] = 160
    latent(server, other, seed=21)
    for seed in (22, 21, 22):
        assert alone[seed].equal(latent(server, prompt, seed))


def test_inputs_with_a_default_may_be_left_out(server, prompt):
    for name in ("warmup_steps", "dense_end_steps", "dense_blocks", "precision", "pool_skipped"):
        del prompt["3"]["inputs"][name]
    with pytest.raises(PromptFailed, match="Required input is missing"):
        latent(server, prompt, seed=23)


def test_a_split_run_goes_on_with_its_masks_also_out_of_the_cache(server, prompt):
    """Two sampler nodes, the second one's run continues the first one's; also where ComfyUI has cached a part."""
    split = copy.deepcopy(prompt)
    second = split["30"] = copy.deepcopy(split["3"])
    sampler = split["6"]["inputs"]
    sampler["steps"] = 6
    common = {k: v for k, v in sampler.items() if k not in ("seed", "denoise")}
    split["31"] = {"class_type": "KSamplerAdvanced", "inputs": {
        **common, "add_noise": "enable", "noise_seed": 51, "start_at_step": 0, "end_at_step": 3,
        "return_with_leftover_noise": "enable"}}
    split["6"] = {"class_type": "KSamplerAdvanced", "inputs": {
        **common, "model": ["30", 0], "latent_image": ["31", 0], "add_noise": "disable", "noise_seed": 51,
        "start_at_step": 3, "end_at_step": 6, "return_with_leftover_noise": "disable"}}

    def summaries(seed):
        before = len(server.summaries())
        split["31"]["inputs"]["noise_seed"] = seed
        latent(server, split)
        return server.summaries()[before:]

    unlinked = summaries(51)
    assert unlinked[1]["skipped_per_step"][0] == 0
    second["inputs"]["continue_from"] = ["3", 1]
    linked = summaries(52)
    assert linked[0]["carried_bytes"] > 0 and linked[1]["skipped_per_step"][0] > 0 and not linked[1]["notes"]
    second["inputs"]["rule.threshold"] = -0.75
    cached, = summaries(52)
    assert cached["skipped_per_step"][0] > 0 and not cached["notes"], "the first sampler's masks are still there"
    both = summaries(53)
    assert len(both) == 2 and both[1]["skipped_per_step"][0] > 0


@pytest.mark.parametrize("name, value, said", [
    ("dense_blocks", "x", "is not a block number or range"),
    ("rule.threshold", 4.0, "bigger than max"),
    ("rule.threshold", -31.0, "smaller than min"),
    ("rule", "profile", "choose error budget or threshold"),
    ("warmup_steps", -1, "smaller than min"),
    ("precision", "fp8", "not in list"),
])
def test_bad_values_are_refused_on_the_node_before_anything_runs(server, prompt, name, value, said):
    prompt["3"]["inputs"][name] = value
    with pytest.raises(PromptFailed) as caught:
        server.queue(prompt)
    errors = json.loads(str(caught.value))["node_errors"]["3"]
    assert errors["class_type"] == "LiteAttention" and said in json.dumps(errors) and len(errors["errors"]) == 1


def test_a_bad_value_that_arrives_by_a_link_stops_at_the_node(server, prompt):
    prompt["3"]["inputs"]["dense_blocks"] = ["20", 0]
    prompt["20"] = {"class_type": "PrimitiveString", "inputs": {"value": "nonsense"}}
    with pytest.raises(PromptFailed, match="is not a block number or range") as caught:
        server.run(prompt)
    assert '"node_id": "3"' in str(caught.value)
    del prompt["20"]
    prompt["3"]["inputs"]["dense_blocks"] = ""
    latent(server, prompt, seed=31)


def test_interrupt_in_mid_run_then_a_clean_prompt(server, prompt):
    alone = latent(server, prompt, seed=41)
    long = copy.deepcopy(prompt)
    long["6"]["inputs"] |= {"steps": 400, "seed": 42}
    before = len(server.summaries())
    prompt_id = server.queue(long)
    deadline = time.monotonic() + 60
    # The sampler's progress bar in the log is the one sign over HTTP that a step has finished.
    while not re.search(r"[1-9]\d*/400 ", server.log()) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.post("/interrupt", {})
    with pytest.raises(PromptFailed, match="execution_interrupted"):
        server.wait(prompt_id, 60)
    cut = server.summaries()[before]
    assert 0 < cut["steps_done"] < 400, "the summary of what ran is there"
    assert alone.equal(latent(server, prompt, seed=41))


def test_without_triton_the_pack_loads_and_the_workflow_completes(tmp_path, prompt):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['triton'] = None\nprint('triton is out of reach', flush=True)\n")
    with ComfyServer(COMFY, environment={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}) as blocked:
        assert "triton is out of reach" in blocked.log() and loaded(blocked)
        latent(blocked, prompt)
        assert blocked.summaries()[-1]["sparse_calls"] == 20
