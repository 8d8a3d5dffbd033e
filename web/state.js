// One small text on a node: how the workers are that it has to do with, in every tab and as long as it is true.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { findNode } from "./find_node.js";

const PREFIX = "HybridDiT_";
const EVENT = "hybrid_dit.state"; // nodes/states.py sends it, and all of them to a new tab
const WIDGET = "hybrid_dit_state";
const LINE = 16, MARGIN = 4; // pixels; the margin is left by classic nodes, on all sides

const states = new Map(); // workflow id -> (execution id -> what was last heard)
const copies = new Map(); // workflow id -> (execution id -> id of the workflow that ran the node)
let ready = false; // whether there is a graph yet

app.registerExtension({
  name: "HybridDiT.State",
  setup() {
    api.addEventListener(EVENT, ({ detail: state }) => {
      keep(state);
      show(state.node);
    });
    api.addEventListener("execution_cached", ({ detail: { nodes } }) => nodes.forEach(adopt));
    api.addEventListener("reconnecting", () => {
      const known = [...states.values()].flatMap(ofGraph => [...ofGraph.keys()]);
      states.clear(); // of a server that may be gone
      known.forEach(show);
    });
  },
  afterConfigureGraph() {
    ready = true;
    for (const id of new Set([...states.values()].flatMap(ofGraph => [...ofGraph.keys()]))) show(id);
  },
});

function keep(state) {
  const ofGraph = states.get(state.graph) ?? new Map();
  states.set(state.graph, ofGraph.set(state.node, state));
}

// A node whose result is another run's: that of a copy of this workflow, unless this one has run it, too.
function adopt(id) {
  const { id: graph } = app.rootGraph;
  const ran = [...states.values()].map(ofGraph => ofGraph.get(id)).filter(Boolean);
  if (!ran.length || states.get(graph)?.has(id)) return;
  const last = ran.reduce((a, b) => (a.number > b.number ? a : b));
  copies.set(graph, (copies.get(graph) ?? new Map()).set(id, last.graph));
  show(id);
}

function textOf(id) {
  const { id: graph } = app.rootGraph;
  const state = states.get(graph)?.get(id) ?? states.get(copies.get(graph)?.get(id))?.get(id);
  return state?.text ?? "";
}

function show(id) {
  const node = ready && findNode(id);
  if (!node?.type?.startsWith(PREFIX)) return;
  const text = textOf(id);
  let widget = node.widgets?.find(({ name }) => name === WIDGET);
  if (!widget && !text) return;
  widget ??= add(node);
  const [line] = widget.element.children;
  line.textContent = text;
  widget.element.title = text;
  fit(node);
}

// A node becomes higher where the text does not fit, and stays so.
function fit(node) {
  const [width, height] = node.size, least = node.computeSize()[1];
  if (height < least) node.setSize([width, least]);
  node.setDirtyCanvas?.(true, true);
}

function add(node) {
  const box = document.createElement("div"), line = document.createElement("div");
  line.style.cssText = `font: 11px/${LINE}px sans-serif; color: var(--descrip-text, #999); white-space: pre-line;
    overflow-wrap: break-word; padding: 0 4px; pointer-events: auto; user-select: text`;
  line.setAttribute("role", "status");
  box.style.overflow = "hidden";
  box.append(line);
  const getMinHeight = () => (line.textContent ? Math.max(LINE, line.offsetHeight) + 2 * MARGIN : 0);
  const options = { serialize: false, hideOnZoom: true, margin: MARGIN, getMinHeight, getMaxHeight: getMinHeight };
  const widget = node.addDOMWidget(WIDGET, "state", box, options);
  new ResizeObserver(() => fit(node)).observe(line); // it has no height before it is on the page
  widget.serialize = false; // neither in the prompt nor in the saved workflow
  return widget;
}
