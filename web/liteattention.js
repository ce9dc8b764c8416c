/**
 * Shows on a LiteAttention node what its runs do: a chart of the share of attention skipped in each step, and lines of
 * text. The subgraph nodes around it show the same. Works with both renderers of the frontend.
 *
 * The server sends EVENT after a step and at the end of a run (host/progress.py). What a run has shown is kept in the
 * browser by workflow and node, so that it is there again after a change of tab, a reload, or a run from the cache; the
 * workflow itself stays as it is.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "LiteAttention.Run";
const EVENT = "liteattention.run";
const NODE_CLASS = "LiteAttention";
/** The frontend's name for progress text on a node: its own text finds this widget and is not shown a second time. */
const WIDGET = "$$node-text-preview";
/** On subgraph nodes, where the frontend shows no text and takes names with $$ for previews of inner nodes. */
const OUTER_WIDGET = "liteattention_run";
const STORED = "LiteAttention.runs";
const WORKFLOWS_KEPT = 40;
const HEIGHT = 124;
const INACTIVE_MODES = [2, 4]; // muted, bypassed
const EARLIER = {
  en: "bypassed; this was an earlier run",
  zh: "已绕过，以下为之前一次运行",
  ja: "バイパス中。以下は以前の実行です",
  ko: "우회됨. 아래는 이전 실행입니다",
};
const STYLE = `
.liteattention-run { box-sizing: border-box; display: flex; flex-direction: column; gap: 4px; min-height: ${HEIGHT}px;
  width: 100%; height: 100%; padding: 6px 8px; border-radius: 8px; overflow: hidden; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); font: 11px/1.35 system-ui, sans-serif; }
.liteattention-run.earlier svg { opacity: 0.5; }
.liteattention-run svg { flex: none; width: 100%; height: 34px; }
.liteattention-run svg:empty { display: none; }
.liteattention-run svg .computed { fill: currentColor; opacity: 0.16; }
.liteattention-run svg .dense { fill: currentColor; opacity: 0.32; }
.liteattention-run svg .skipped { fill: #2f9e6e; }
.liteattention-run svg .pending { fill: currentColor; opacity: 0.3; }
.liteattention-run pre { flex: 1 1 0; min-height: 0; margin: 0; padding-left: 7px; overflow-y: auto; font: inherit;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; border-left: 3px solid #888; }
.liteattention-run strong { font-weight: 600; }
.liteattention-run pre.running { border-color: #4a90d9; }
.liteattention-run pre.on { border-color: #2f9e6e; }
.liteattention-run pre.slower { border-color: #d98a2b; }`;

/** Of each workflow: node id, as in "5:3" for node 3 in the subgraph node 5, to the last message about it. */
const kept = read();

function read() {
  try {
    return new Map(JSON.parse(localStorage.getItem(STORED) ?? "[]"));
  } catch {
    return new Map();
  }
}

/** Keep a message; when its run is over also beyond this page. Other windows may have kept theirs meanwhile. */
function keep(run) {
  if (run.state !== "running") run.time = Date.now();
  const runs = { ...kept.get(run.workflow), [run.node]: run };
  kept.delete(run.workflow);
  kept.set(run.workflow, runs);
  if (run.state === "running") return;
  try {
    const all = read();
    all.delete(run.workflow);
    localStorage.setItem(STORED, JSON.stringify([...all, [run.workflow, runs]].slice(-WORKFLOWS_KEPT)));
  } catch {
    // No storage, or a full one: it is kept as long as the page is open.
  }
}

const rootGraph = () => app.rootGraph ?? app.graph;

/** The nodes from the outermost subgraph node to the LiteAttention node; none where the workflow has changed. */
function nodesAlong(path) {
  const nodes = [];
  let graph = rootGraph();
  for (const id of path.split(":")) {
    const node = graph?.getNodeById(id);
    if (!node) return [];
    nodes.push(node);
    graph = node.subgraph;
  }
  return nodes.at(-1).comfyClass === NODE_CLASS ? nodes : [];
}

/** Whether a node can hold widgets of its own: subgraph nodes of older frontends cannot. */
function holdsWidgets(node) {
  return !node.isSubgraphNode?.() || node.addCustomWidget !== LiteGraph.LGraphNode.prototype.addCustomWidget;
}

/** The widget on a node, made at the first message: a node that has never run looks as it always did. */
function widgetOf(node, name) {
  const there = node.widgets?.find((widget) => widget.name === name);
  if (there?.runs) return there;
  if (there) {
    there.onRemove?.();
    node.widgets.splice(node.widgets.indexOf(there), 1);
  }
  const element = document.createElement("div");
  element.className = "liteattention-run";
  element.dataset.captureWheel = "true";
  element.addEventListener("wheel", passOnWheel);
  const runs = new Map();
  const widget = node.addDOMWidget(name, "liteattention", element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    margin: 6,
    getMinHeight: () => HEIGHT + 12,
    getValue: () => [...runs.values()].flatMap((run) => run.lines).join("\n"),
    setValue: () => {}, // the frontend's own text, which says the same
  });
  widget.serialize = false;
  widget.runs = runs;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  return widget;
}

/** A wheel that scrolls no text zooms the canvas, as everywhere else on it. */
function passOnWheel(event) {
  const text = event.target.closest("pre");
  const scrolls = text && text.scrollHeight > text.clientHeight && !event.ctrlKey;
  if (scrolls) event.stopPropagation();
  else if (!LiteGraph.vueNodesMode) app.canvas.processMouseWheel(event);
}

/** Show the last message about a LiteAttention node on it and on the subgraph nodes around it. */
function show(run) {
  const nodes = nodesAlong(run.node);
  const earlier = nodes.some((node) => INACTIVE_MODES.includes(node.mode));
  for (const node of nodes) {
    if (!holdsWidgets(node)) continue;
    const { runs, element } = widgetOf(node, node === nodes.at(-1) ? WIDGET : OUTER_WIDGET);
    runs.delete(run.node);
    runs.set(run.node, { ...run, earlier, name: `${nodes.at(-1).title} #${nodes.at(-1).id}` });
    draw(element, [...runs.values()]);
    node.setDirtyCanvas?.(true, true);
  }
}

/** A subgraph node with several LiteAttention nodes in it shows the last run, and the first line of each other one. */
function draw(element, runs) {
  const run = runs.at(-1);
  const others = runs.slice(0, -1);
  const chart = element.querySelector("svg") ?? element.appendChild(svg("svg", { preserveAspectRatio: "none" }));
  const text = element.querySelector("pre") ?? element.appendChild(document.createElement("pre"));
  element.classList.toggle("earlier", run.earlier);
  drawChart(chart, run);
  const scrolled = text.scrollTop;
  text.className = run.state;
  const head = document.createElement("strong");
  head.textContent = [
    ...(run.earlier ? [EARLIER[app.extensionManager?.setting?.get("Comfy.Locale")] ?? EARLIER.en] : []),
    others.length ? `${run.name}: ${run.lines[0]}` : run.lines[0],
  ].join("\n");
  // A workflow can be opened long after its last run: the time tells.
  const time = run.time ? [new Date(run.time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })] : [];
  const lines = [...others.map(({ name, lines }) => `${name}: ${lines[0]}`), ...run.lines.slice(1), ...time];
  text.replaceChildren(head, lines.map((line) => `\n${line}`).join(""));
  text.scrollTop = scrolled;
}

/** A column for each step: all of its attention, and from below the share of it that was skipped. */
function drawChart(chart, { steps, total }) {
  const count = Math.max(total, steps.length);
  chart.setAttribute("viewBox", `0 0 ${Math.max(count, 1)} 1`);
  const columns = steps.length ? Array.from({ length: count }, (_, i) => column(i, steps[i])) : [];
  chart.replaceChildren(...columns);
}

function column(i, step) {
  const [skipped, dense] = step ?? [null, false];
  const group = svg("g");
  const bar = (kind, height) =>
    group.append(svg("rect", { class: kind, x: i + 0.06, width: 0.88, y: 1 - height, height }));
  if (skipped === null) {
    bar("pending", 0.06);
  } else {
    bar(dense ? "dense" : "computed", 1);
    if (skipped > 0) bar("skipped", skipped);
  }
  const title = svg("title");
  title.textContent = `${i + 1}: ${skipped === null ? "-" : `${Math.round(skipped * 100)}%`}`;
  group.append(title);
  return group;
}

function svg(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Everything that is kept about the workflow on the canvas. */
function showKept() {
  for (const run of Object.values(kept.get(rootGraph()?.id) ?? {})) show(run);
}

// A second copy of the pack has a script, too.
if (!app.extensions?.some((extension) => extension.name === NAME)) {
  app.registerExtension({
    name: NAME,
    init() {
      document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
      api.addEventListener(EVENT, ({ detail: run }) => {
        if (!run.workflow) return; // not queued from a workflow: no node here is the one that runs
        keep(run);
        if (run.workflow === rootGraph()?.id) show(run);
      });
      // A node that is bypassed now has no part in this prompt, and its text is of another one.
      api.addEventListener("execution_start", showKept);
    },
    afterConfigureGraph: showKept,
  });
}
