"""What a run shows in ComfyUI's real frontend, with both of its renderers: chart and lines, and where they are kept."""

import json
import time

import pytest
from comfyui import find_comfyui

from liteattention.host.graph_checks import NOT_SAMPLED_NOTE, REPLACED_NOTE
from liteattention.tools.browser import READY, missing, open_frontend
from liteattention.tools.server import ROOT, ComfyServer

RENDERERS = {"litegraph": False, "nodes 2.0": True}
LITE, SAMPLER, REPORT, SHIFT = 4, 7, 12, 3
BYPASSED = 4

LOAD = """
const [graph, name, done] = arguments;
app.loadGraphData(JSON.parse(graph), true, true, name).then(() => done(null), error => done(String(error)));
"""
# What is shown on the nodes along a path of ids, e.g. [4], from outside to inside.
LOOK = """
const [path, done] = arguments;
let graph = app.rootGraph;
const look = id => {
  const node = graph.getNodeById(id);
  graph = node.subgraph;
  const widgets = node.widgets.filter(widget => widget.type === 'liteattention' || widget.name.startsWith('$$'));
  const element = widgets[0]?.element, rect = element?.getBoundingClientRect();
  return {
    widgets: widgets.length, size: [...node.size],
    lines: element?.querySelector('pre').innerText.split('\\n').slice(0, -1) ?? [],  // the last one is the time
    state: element?.querySelector('pre').className, earlier: element?.classList.contains('earlier'),
    columns: [...(element?.querySelectorAll('svg g') ?? [])].map(g => [...g.querySelectorAll('rect')].map(
      rect => [rect.getAttribute('class'), Number(rect.getAttribute('height'))])),
    visible: Boolean(element?.isConnected && rect.width > 100 && rect.height >= 124 * app.canvas.ds.scale * 0.9),
  };
};
const frames = left => left ? requestAnimationFrame(() => frames(left - 1)) : done(path.map(look));
frames(3);
"""
WATCH = """
window.heights = [];
app.api.addEventListener('liteattention.run', () => requestAnimationFrame(() => requestAnimationFrame(() => {
  const node = app.rootGraph.getNodeById(arguments[0]);
  const {height} = node.widgets.find(widget => widget.type === 'liteattention').element.getBoundingClientRect();
  window.heights.push([node.size[1], Math.round(height)]);
})));
"""
QUEUE = """
const done = arguments[0];
['execution_success', 'execution_error'].forEach(
  name => app.api.addEventListener(name, event => done(event.detail), {once: true}));
app.queuePrompt(0);
"""


def small_graph(number=0):
    """Model, prompt, size, LiteAttention, sampler and Report: a run of four short steps; each number is a workflow."""
    graph = json.loads((ROOT / "tests" / "host" / "small_graph.json").read_text(encoding="utf-8"))
    return graph | {"id": f"00000000-0000-4000-8000-{number:012}"}


@pytest.fixture(scope="module")
def server():
    with ComfyServer(find_comfyui(), environment={"OMP_NUM_THREADS": "1"}) as running:
        running.post("/settings", {"Comfy.TutorialCompleted": True})
        yield running


@pytest.fixture(scope="module")
def browser(server):
    if missing():
        pytest.skip(f"needs {missing()}")
    opened = open_frontend(server.port)
    yield opened
    opened.quit()


class Page:
    """The frontend with a graph in it."""

    seeds = iter(range(1000, 2000))

    def __init__(self, server, browser):
        self.server, self.browser = server, browser

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def load(self, graph, name="small"):
        assert self.browser.execute_async_script(LOAD, json.dumps(graph), name) is None
        self.js("app.canvas.ds.scale = 1; app.canvas.ds.offset = [-300, 0]; app.canvas.setDirty(true, true)")

    def reload(self):
        self.browser.refresh()
        self.until(lambda: self.js(READY))

    def until(self, done, seconds=60):
        deadline = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < deadline, (self.browser.get_log("browser"), self.server.log()[-2000:])
            time.sleep(0.05)
        return found

    def run(self, new=True):
        """Run the graph to its end, with another seed than ever before or as it is."""
        if new:
            self.js("""
                const all = graph => graph.nodes.flatMap(node => [node, ...(node.subgraph ? all(node.subgraph) : [])]);
                all(app.rootGraph).find(node => node.type === 'KSampler').widgets[0].value = arguments[0]""",
                    next(self.seeds))
        ended = self.browser.execute_async_script(QUEUE)
        assert "exception_message" not in ended, ended

    def look(self, *path):
        """Of the LiteAttention node, or of the nodes of this path."""
        shown = self.browser.execute_async_script(LOOK, [str(node) for node in path or (LITE,)])
        return shown if path else shown[0]

    def graph(self):
        return self.js("return JSON.stringify(app.rootGraph.serialize())")


@pytest.fixture(params=RENDERERS, scope="module")
def page(request, server, browser):
    opened = Page(server, browser)
    server.post("/settings", {"Comfy.VueNodes.Enabled": RENDERERS[request.param]})
    opened.js("localStorage.removeItem('LiteAttention.runs')")
    opened.reload()
    assert opened.js("return LiteGraph.vueNodesMode") is RENDERERS[request.param]
    return opened


def test_a_node_that_has_never_run_looks_as_it_always_did(page):
    page.load(small_graph(1))
    assert page.look()["widgets"] == 0


def test_a_run_shows_a_chart_and_lines_that_stay_lines(page):
    page.browser.get_log("browser")
    page.load(small_graph(6))
    page.js(WATCH, LITE)
    page.run()
    heights = page.js("return window.heights")
    assert len(heights) >= 2 and all(height == heights[-1] for height in heights), "it grows at most once"
    shown, summary = page.look(), page.server.summaries()[-1]
    assert shown["widgets"] == 1 and shown["visible"] and not shown["earlier"]
    assert shown["lines"][0] == summary["headline"] and len(shown["lines"]) >= 4
    assert shown["state"] == ("slower" if (summary["speed_up"] or 2) < 1 else "on")
    assert [column[0][0] for column in shown["columns"]] == ["dense", "computed", "computed", "computed"]
    heights = [column[1][1] if len(column) > 1 else 0 for column in shown["columns"]]
    assert heights == pytest.approx(summary["skipped_per_step"], abs=1e-3) and heights[-1] > 0
    severe = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"
              and "huggingface.co" not in entry["message"]]  # what the default graph would like to download
    assert not severe


def test_the_size_of_the_node_and_the_workflow_stay_as_they_were(page):
    page.load(small_graph())
    page.run()
    size, graph = page.look()["size"], page.graph()
    page.run(new=False)
    page.js("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    page.load(json.loads(graph), "again")
    assert page.look()["size"] == size and page.look()["widgets"] == 1
    assert json.loads(page.graph()) == json.loads(graph)
    page.js("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    assert not page.js("return app.extensionManager.workflow.activeWorkflow.isModified")
    assert not any("skipped" in str(value) for node in json.loads(graph)["nodes"]
                   for value in (node.get("widgets_values", []), node["properties"]))


def test_the_text_is_there_again_after_a_change_of_tab_a_reload_and_a_run_from_the_cache(page):
    page.load(small_graph())
    page.run()
    shown, runs = page.look()["lines"], len(page.server.summaries())
    page.js("return app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.until(lambda: page.js("return app.rootGraph.nodes.length") == 0)
    page.js("return app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.until(lambda: page.js(f"return Boolean(app.rootGraph.getNodeById({LITE}))"))
    assert page.look()["lines"] == shown
    page.reload()
    page.until(lambda: page.js(f"return Boolean(app.rootGraph.getNodeById({LITE}))"))
    assert page.look()["lines"] == shown
    page.run(new=False)
    assert page.look()["lines"] == shown and len(page.server.summaries()) == runs


def test_subgraph_nodes_show_it_at_every_depth(page):
    page.load(small_graph(2))
    outer, inner = page.js("""
        const inner = app.rootGraph.convertToSubgraph(new Set(arguments[0].map(id => app.rootGraph.getNodeById(id))));
        const other = app.rootGraph.getNodeById(arguments[1]);
        const outer = app.rootGraph.convertToSubgraph(new Set([inner.node, other]));
        return [outer.node.id, outer.subgraph.nodes.find(node => node.subgraph).id]""", [LITE, SAMPLER], SHIFT)
    page.run()
    shown = page.look(outer, inner, LITE)
    assert shown[0]["visible"] and [node["widgets"] for node in shown] == [1, 1, 1]
    first = page.server.summaries()[-1]["headline"]
    assert [node["lines"] for node in shown[:2]] == [shown[2]["lines"]] * 2 and shown[0]["lines"][0] == first
    page.js("app.canvas.setGraph(app.rootGraph.getNodeById(arguments[0]).subgraph)", outer)
    assert page.look(outer, inner, LITE)[1]["visible"]
    page.run()
    assert page.look(outer, inner, LITE)[0]["lines"][0] == page.server.summaries()[-1]["headline"]
    saved = json.loads(page.graph())
    page.load(saved, "with subgraphs")
    assert page.look(outer, inner, LITE)[0]["lines"][0] == page.server.summaries()[-1]["headline"]


def test_a_subgraph_node_shows_all_runs_in_it(page):
    page.load(small_graph(4))
    second, outer = page.js("""
        const [lite, sampler, report] = [...arguments].map(id => app.rootGraph.getNodeById(id));
        const second = LiteGraph.createNode('LiteAttention');
        app.rootGraph.add(second);
        lite.getInputNode(0).connect(0, second, 0);
        second.widgets.find(widget => widget.name === 'min_tokens').value = 128;
        const again = sampler.clone();
        app.rootGraph.add(again);
        sampler.inputs.forEach((input, slot) => {
          if (slot && input.link != null) sampler.getInputNode(slot).connect(sampler.getInputLink(slot).origin_slot,
                                                                            again, slot);
        });
        second.connect(0, again, 0);
        sampler.connect(0, again, 3);
        again.connect(0, report, 1);
        return [second.id, app.rootGraph.convertToSubgraph(new Set([lite, second])).node.id]""", LITE, SAMPLER, REPORT)
    page.run()
    first, last = (summary["headline"] for summary in page.server.summaries()[-2:])
    lines = page.look(outer, second)[0]["lines"]
    assert lines[0] == f"LiteAttention #{second}: {last}" and lines[1] == f"LiteAttention #{LITE}: {first}"
    assert page.look(outer, second)[1]["lines"][0] == last and page.look(outer, LITE)[1]["lines"][0] == first


def test_bypassed_the_text_is_marked_and_report_says_off(page):
    page.load(small_graph())
    page.run()
    before = page.look()["lines"]
    page.js("app.rootGraph.getNodeById(arguments[0]).mode = arguments[1]", LITE, BYPASSED)
    runs = len(page.server.summaries())
    page.run()
    shown = page.look()
    assert len(page.server.summaries()) == runs and shown["earlier"]
    assert shown["lines"] == ["bypassed; this was an earlier run", *before]
    page.js("app.rootGraph.getNodeById(arguments[0]).mode = 0", LITE)
    page.run()
    assert not page.look()["earlier"] and page.look()["lines"][0] == page.server.summaries()[-1]["headline"]


def test_a_node_that_does_nothing_says_so(page):
    graph = small_graph(3)
    page.load(graph)
    page.js("app.rootGraph.getNodeById(arguments[0]).connect(0, app.rootGraph.getNodeById(arguments[1]), 0)",
            SHIFT, SAMPLER)
    page.js("app.rootGraph.getNodeById(arguments[0]).connect(0, app.rootGraph.getNodeById(arguments[1]), 0)",
            SHIFT, REPORT)
    page.run()
    assert page.look()["lines"] == [NOT_SAMPLED_NOTE] and page.look()["state"] == "off"
    assert not page.look()["columns"]
    second = page.js("""
        const second = LiteGraph.createNode('LiteAttention');
        app.rootGraph.add(second);
        app.rootGraph.getNodeById(arguments[0]).connect(0, second, 0);
        second.connect(0, app.rootGraph.getNodeById(arguments[1]), 0);
        return second.id""", LITE, SAMPLER)
    page.run()
    assert page.look()["lines"] == [REPLACED_NOTE]
    assert page.look(second)[0]["lines"][0] == page.server.summaries()[-1]["headline"]


def test_the_script_of_a_second_copy_does_nothing(page):
    assert page.browser.execute_async_script("""
        const done = arguments[0], before = app.extensions.length;
        import('/extensions/ComfyUI-LiteAttention/liteattention.js?copy').then(
          () => done(app.extensions.length - before), error => done(String(error)))""") == 0
