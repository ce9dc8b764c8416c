"""Shipped workflows on a real server and in its real frontend, with empty files in the places of the models."""

import copy
import json
import shutil
import time

import pytest
from comfyui import find_comfyui

from liteattention.tools.browser import missing, open_frontend
from liteattention.tools.server import ROOT, ComfyServer, PromptFailed
from liteattention.tools.workflow_files import INPUT, OUTPUT, inner_nodes, levels

COMFY = find_comfyui()
FILES = sorted((ROOT / "workflows").glob("*.json"))
GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
DEMO = "demo_liteattention"
WINDOW = 1600, 857
READABLE = 8 / 14
"""Below this scale the frontend's default renderer draws no text: it would be smaller than 8 pixels."""
LOAD_AND_CONVERT = """
const [graph, name, done] = arguments;
(async () => {
  await app.loadGraphData(JSON.parse(graph), true, true, name, {openSource: 'template'});
  await new Promise(resolve => setTimeout(resolve, 100));
  const prompt = await app.graphToPrompt();
  const graphs = [app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])];
  done({nodes: graphs.flatMap(graph => graph.nodes.filter(node => !node.isSubgraphNode?.()).map(
          node => [node.type, node.type in LiteGraph.registered_node_types])),
        scale: app.canvas.ds.scale, output: prompt.output});
})().catch(error => done({error: String(error)}));
"""
SEARCH = "app.graph.clear(); app.extensionManager.command.execute('Workspace.SearchBox.Toggle')"


@pytest.fixture(scope="module")
def server():
    with ComfyServer(COMFY, environment={"OMP_NUM_THREADS": "1"}) as running:
        models = running.base / "models"
        for graph in GRAPHS.values():
            for model in (m for node in inner_nodes(graph) for m in node["properties"].get("models", ())):
                (models / model["directory"]).mkdir(parents=True, exist_ok=True)
                (models / model["directory"] / model["name"]).touch()
        (models / "lite_attention").mkdir(exist_ok=True)
        (models / "lite_attention" / "wan2.1_t2v_1.3B.safetensors").touch()
        shutil.copy(COMFY / "input" / "example.png", running.base / "input" / "example.png")
        yield running


@pytest.fixture(scope="module")
def known(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def graphs(known):
    """Those whose nodes this ComfyUI has."""
    return {name: graph for name, graph in GRAPHS.items()
            if {node["type"] for node in inner_nodes(graph)} - known.keys() <= {"MarkdownNote"}}


def own_inputs(node, specs):
    """The values of a node's widgets, as far as this ComfyUI has them."""
    values, inputs = iter(node["widgets_values"]), {}
    for name in (slot["name"] for slot in node["inputs"] if "widget" in slot):
        options, value = (specs.get(name, [None])[1:] or [{}])[0], next(values)
        if name.partition(".")[0] in specs:
            inputs[name] = value
        if options.get("control_after_generate") or options.get("image_upload"):
            next(values)
    assert next(values, None) is None, f"{node['type']}: more values than widgets"
    return inputs


def to_prompt(graph, known):
    """What the frontend's graphToPrompt does for a graph without reroutes, muted and bypassed nodes."""
    inside, prompt = {level.id: level for level in levels(graph)[1:]}, {}

    def add(level, prefix, given):
        """Adds the nodes of a level, `given` what is linked to its inputs; what comes out of it."""
        links, outputs, waiting = {link.number: link for link in level.links}, {}, list(level.nodes)

        def source(number):
            link = links[number]
            return given.get(link.slot) if link.source == INPUT else outputs[link.source, link.slot]

        while waiting:
            node = next(n for n in waiting if all(
                links[slot["link"]].source in {INPUT} | {key for key, _ in outputs}
                for slot in n["inputs"] if slot["link"] is not None))
            waiting.remove(node)
            linked = {slot["name"]: found for slot in node["inputs"] if slot["link"] is not None
                      and (found := source(slot["link"])) is not None}
            key = f"{prefix}{node['id']}"
            if node["type"] in inside:
                names = [slot["name"] for slot in node["inputs"]]
                found = add(inside[node["type"]], f"{key}:", {names.index(name): link for name, link in linked.items()})
            else:
                found = {number: [key, number] for number in range(len(node["outputs"]))}
                if node["type"] in known:
                    sections = known[node["type"]]["input"]
                    specs = {**sections.get("required", {}), **sections.get("optional", {})}
                    prompt[key] = {"class_type": node["type"], "inputs": {**own_inputs(node, specs), **linked}}
            outputs.update({(node["id"], number): link for number, link in found.items()})
        return {link.target_slot: source(link.number) for link in level.links if link.target == OUTPUT}

    add(levels(graph)[0], "", {})
    return prompt


@pytest.fixture
def blocked(server):
    """A server that is busy with the demo: a prompt that is posted now is validated and waits."""
    long = json.loads((ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    long["6"]["inputs"]["steps"] = 10000
    prompt_id = server.queue(long)
    deadline = time.monotonic() + 60
    while not server.get("/queue")["queue_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield server
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})
    with pytest.raises(PromptFailed, match="execution_interrupted"):
        server.wait(prompt_id, 60)


def test_the_server_accepts_every_workflow_and_refuses_a_wrong_name(blocked, known, graphs):
    for name, graph in graphs.items():
        answer = blocked.post("/prompt", {"prompt": to_prompt(graph, known)})
        assert not answer["node_errors"], name
        assert any(entry[1] == answer["prompt_id"] for entry in blocked.get("/queue")["queue_pending"]), "nothing ran"
    wrong = to_prompt(GRAPHS["wan2.1_1.3B_t2v_liteattention"], known)
    loader = next(node for node in wrong.values() if node["class_type"] == "VAELoader")
    loader["inputs"]["vae_name"] = "another.safetensors"
    with pytest.raises(PromptFailed, match="not in list"):
        blocked.queue(wrong)


def test_the_demo_runs_to_the_end(server, known):
    outputs = server.run(to_prompt(GRAPHS[DEMO], known), timeout_s=300)
    pictures = [entry for output in outputs.values() for entry in output.get("images", ())]
    assert len(pictures) == 3 and all(server.output_file(entry).stat().st_size > 0 for entry in pictures)
    summary = server.summaries()[-1]
    assert summary["sparse_calls"] > 0 and summary["skipped"] > 0.1
    assert set(summary["dense_calls"]) <= {"cross-attention", "warm-up step"}, "as the note in the graph says"


def on_the_tiny_model(prompt, **values):
    """The prompt with the demo's model, prompt and decoder in the places of Wan's, small and in few steps."""
    prompt = copy.deepcopy(prompt)
    positive, negative = (next(node["inputs"][name][0] for node in prompt.values() if node["class_type"] == "KSampler")
                          for name in ("positive", "negative"))
    size = {"width": 160, "height": 160, "length": 25}
    small = {**size, "steps": 6, "cfg": 2.0, "shift": 3.0, "min_tokens": 128, **values}
    for key, node in list(prompt.items()):
        inputs = node["inputs"]
        inputs |= {name: value for name, value in small.items() if name in inputs}
        for name, value in inputs.items():
            if value == [negative, 0]:
                inputs[name] = [positive, 1]
        if key in (positive, negative) or node["class_type"] in ("CLIPLoader", "VAELoader"):
            del prompt[key]
        elif node["class_type"] == "UNETLoader":
            prompt[key] = {"class_type": "LiteAttentionDemoModel", "inputs": {}}
        elif node["class_type"] == "VAEDecode":
            prompt[key] = {"class_type": "LiteAttentionDemoDecode", "inputs": {"samples": inputs["samples"]}}
    prompt[positive] = {"class_type": "LiteAttentionDemoPrompt",
                        "inputs": {"shape": "disc", "count": 2, "speed": "medium"}}
    return prompt


def test_report_and_compare_run_to_the_end(server, known):
    graph = to_prompt(GRAPHS["liteattention_report_and_compare"], known)
    prompt = on_the_tiny_model(graph, steps=10, **{"rule.error_budget": 1.0})
    outputs = server.run(prompt, timeout_s=300)
    kinds = {node["class_type"]: outputs[key] for key, node in prompt.items() if key in outputs}
    for kind in ("LiteAttentionReport", "LiteAttentionCompare"):
        assert server.output_file(kinds[kind]["images"][0]).stat().st_size > 0
    assert server.summaries()[-1]["sparse_calls"] > 0


@pytest.fixture(scope="module")
def browser(server):
    if missing():
        pytest.skip(f"needs {missing()}")
    server.post("/settings", {"Comfy.TutorialCompleted": True})
    opened = open_frontend(server.port)
    yield opened
    opened.quit()


def test_the_frontend_loads_and_converts_every_workflow(browser, known, graphs):
    browser.get_log("browser")  # what a frontend says with an empty user folder
    width, height = browser.execute_script("return [outerWidth - innerWidth, outerHeight - innerHeight]")
    browser.set_window_size(WINDOW[0] + width, WINDOW[1] + height)
    for name, graph in graphs.items():
        found = browser.execute_async_script(LOAD_AND_CONVERT, json.dumps(graph), name)
        assert "error" not in found, (name, found)
        assert sorted(kind for kind, _ in found["nodes"]) == sorted(node["type"] for node in inner_nodes(graph)), name
        assert all(there for _, there in found["nodes"]), f"{name}: missing nodes"
        assert found["scale"] > READABLE, (name, found["scale"])
        converted = {key: {"class_type": node["class_type"], "inputs": node["inputs"]}
                     for key, node in found["output"].items() if node["class_type"] in known}
        assert converted == to_prompt(graph, known), name
        severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not severe, (name, severe)
    listed = browser.execute_async_script(
        "const done = arguments[1]; Promise.all(arguments[0].map(name => fetch("
        "`/api/workflow_templates/ComfyUI-LiteAttention/${name}.jpg`).then(answer => answer.status))).then(done)",
        list(GRAPHS))
    assert set(listed) == {200}, "thumbnails where the template browser asks for them"


def test_help_pages_and_their_pictures_are_served_where_the_frontend_asks_for_them(browser, known):
    own = [name for name in known if name.startswith("LiteAttention")]
    answers = browser.execute_async_script("""
        const done = arguments[1];
        Promise.all(arguments[0].flatMap(name => ["md", "jpg"].map(async kind => {
          const answer = await fetch(`/extensions/ComfyUI-LiteAttention/docs/${name}.${kind}`);
          return [name, kind, answer.status, (await answer.blob()).size];
        }))).then(done)""", own)
    assert len(answers) == 2 * len(own) and not [answer for answer in answers if answer[2] != 200 or answer[3] < 200]


def test_a_run_in_the_frontend_shows_text_report_and_comparison(server, browser):
    """What a newcomer does, with the demo's graph made small: load, press Run, look at the node."""
    graph = copy.deepcopy(GRAPHS[DEMO])
    for node in graph["nodes"]:
        if node["widgets_values"][1:] == [20]:  # seed and steps of the dense run, on its subgraph
            node["widgets_values"][1] = 5
    for node in inner_nodes(graph):
        if node["type"] == "EmptyHunyuanLatentVideo":
            node["widgets_values"][:3] = [160, 160, 25]
        elif node["type"] == "KSampler":
            node["widgets_values"][2] = 5
        elif node["type"] == "LiteAttention":
            node["widgets_values"][5] = 128  # min_tokens
    found = browser.execute_async_script(LOAD_AND_CONVERT, json.dumps(graph), "small demo")
    assert "error" not in found
    before, texts = len(server.summaries()), []
    browser.execute_script("""
        const button = document.querySelector('[data-testid=queue-button]');  // not in every frontend
        if (button) button.click(); else app.queuePrompt(0);""")
    deadline = time.monotonic() + 120
    while not (texts and texts[-1].startswith("on: ")):
        assert time.monotonic() < deadline, (texts, server.log()[-2000:])
        time.sleep(0.05)
        text = browser.execute_script("""
            const node = app.graph.nodes.find(node => node.type === 'LiteAttention');
            return node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? ''""")
        if text and text not in texts:
            texts.append(text)
    assert any(text.startswith("step ") for text in texts) and len(server.summaries()) == before + 1
    shown = """
        return ['LiteAttentionReport', 'LiteAttentionCompare'].map(type => {
          const node = app.graph.nodes.find(node => node.type === type);
          return (node.imgs ?? []).length;
        })"""
    while browser.execute_script(shown) != [1, 1]:
        assert time.monotonic() < deadline, browser.execute_script(shown)
        time.sleep(0.2)


def test_the_template_browser_lists_them_all(server):
    assert set(GRAPHS) <= set(server.get("/workflow_templates")["ComfyUI-LiteAttention"])


def test_the_first_thing_that_a_search_finds_is_the_node(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    for words in ("sparse attention", "skip attention", "accelerate", "optimize", "wan speed"):
        browser.execute_script(SEARCH)
        deadline = time.monotonic() + 20
        while (box := browser.switch_to.active_element).tag_name != "input":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        box.send_keys(words)
        time.sleep(1)  # results are drawn some time after the last key
        box.send_keys(Keys.ENTER)
        while not (found := browser.execute_script("return app.graph.nodes.map(node => node.type)")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert found == ["LiteAttention"], words
        ActionChains(browser).send_keys(Keys.ESCAPE).perform()  # the new node follows the pointer until then
        time.sleep(0.5)


def test_the_inputs_that_matter_are_the_first_on_the_node(browser):
    """The default renderer shows the advanced ones, too."""
    names = browser.execute_script("""
        app.graph.clear();
        const node = LiteGraph.createNode('LiteAttention');
        app.graph.add(node);
        return node.widgets.map(widget => widget.name)""")
    assert names[:3] == ["rule", "rule.error_budget", "warmup_steps"] and len(names) == 8


def test_the_template_browser_has_the_demo_first_from_a_to_z(browser):
    from selenium.webdriver.common.by import By

    browser.execute_async_script("""
        app.extensionManager.setting.set('Comfy.Templates.SortBy', 'alphabetical').then(() => arguments[0]())""")
    browser.execute_script("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    deadline, pack = time.monotonic() + 60, []
    while not pack:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        pack = browser.find_elements(By.XPATH, "//*[text()='ComfyUI-LiteAttention']")
    browser.execute_script("arguments[0].click()", pack[0])
    shown = []
    while not shown:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        shown = [name for name in browser.execute_script(
            "return [...document.querySelectorAll('h3')].map(title => title.textContent)") if name in GRAPHS]
    assert shown[0] == DEMO
