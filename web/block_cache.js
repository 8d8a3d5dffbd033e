// The plot on Block Cache: the measured residual differences of a run, step by step, and what was cached.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { findNode } from "./find_node.js";

const NODE = "HybridDiT_BlockCache";
const EVENT = "hybrid_dit.block_cache"; // nodes/cache_run.py sends it
const WIDGET = "block_cache_plot";

const WIDTH = 300, HEIGHT = 150;
const LEFT = 36, RIGHT = WIDTH - 10, TOP = 20, BOTTOM = HEIGHT - 36;
const INK = "var(--fg-color, #ddd)", QUIET = "var(--descrip-text, #999)";
const COMPUTED = INK, CACHED = "#2f9ae0", THRESHOLD = "#d9822b"; // seen on dark and on light nodes

const shown = new Map(); // workflow id -> (execution id -> run): a graph that is opened again shows its runs again

app.registerExtension({
  name: "HybridDiT.BlockCache",
  setup() {
    api.addEventListener(EVENT, ({ detail: run }) => {
      const node = findCache(run.node);
      if (!node) return;
      const runs = shown.get(app.rootGraph.id) ?? new Map();
      shown.set(app.rootGraph.id, runs.set(run.node, run));
      show(node, run);
    });
  },
  afterConfigureGraph() {
    for (const [id, run] of shown.get(app.rootGraph.id) ?? []) {
      const node = findCache(id);
      if (node) show(node, run);
    }
  },
});

function findCache(executionId) {
  const node = findNode(executionId);
  return node?.type === NODE ? node : undefined;
}

function show(node, run) {
  let widget = node.widgets?.find(({ name }) => name === WIDGET);
  if (!widget) {
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    svg.style.cssText = "width: 100%; height: 100%; font: 9px sans-serif; pointer-events: auto";
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT, getMaxHeight: () => 2 * HEIGHT };
    widget = node.addDOMWidget(WIDGET, "plot", svg, options);
    widget.serialize = false; // neither in the prompt nor in the saved workflow
  }
  draw(widget.element, run);
  node.setDirtyCanvas?.(true, true);
}

function draw(svg, run) {
  const { evaluations, threshold } = run;
  const diffs = evaluations.map(({ diff }) => diff ?? 0);
  const top = 1.1 * Math.max(threshold, ...diffs, 0.01);
  const last = Math.max(1, run.steps - 1, ...evaluations.map(({ position }) => position));
  const size = Math.min(3.5, Math.max(1.2, (0.4 * (RIGHT - LEFT)) / (last + 1)));
  const x = position => LEFT + 6 + (position / last) * (RIGHT - LEFT - 12);
  const y = diff => BOTTOM - ((diff ?? 0) / top) * (BOTTOM - TOP);

  const parts = [
    label(LEFT - 4, TOP - 9, "residual difference", { fill: QUIET }),
    label(LEFT - 4, TOP + 6, number(top), { fill: QUIET, anchor: "end" }),
    label(LEFT - 4, BOTTOM + 3, "0", { fill: QUIET, anchor: "end" }),
    label(x(0), BOTTOM + 13, "1", { fill: QUIET, anchor: "middle" }),
    label(x(last), BOTTOM + 13, `step ${Math.round(last) + 1}`, { fill: QUIET, anchor: "end" }),
    make("path", { d: `M${LEFT} ${TOP}V${BOTTOM}H${RIGHT}`, fill: "none" }, { stroke: QUIET }),
    line(LEFT, y(threshold), RIGHT, { class: "threshold" }),
  ];
  for (let stream = 0; stream < run.streams; stream++) {
    const points = evaluations.filter(e => e.stream === stream && e.diff !== null);
    const d = points.map((e, i) => `${i ? "L" : "M"}${x(e.position)} ${y(e.diff)}`).join("");
    if (d) parts.push(make("path", { d, fill: "none", opacity: 0.35 }, { stroke: INK }));
  }
  for (const e of evaluations) {
    const mark = e.computed ? square(x(e.position), y(e.diff), size) : circle(x(e.position), y(e.diff), size);
    const title = make("title");
    const measured = e.diff === null ? "not measured" : number(e.diff);
    title.textContent = `step ${number(e.position + 1)}: ${e.computed ? "computed" : "cached"}, ${measured} (${e.reason})`;
    mark.append(title);
    mark.classList.add("evaluation");
    parts.push(mark);
  }
  // The legend has the shapes too, so that nothing depends on colour.
  const middle = HEIGHT - 9;
  parts.push(square(LEFT + 4, middle, 3.5), label(LEFT + 11, middle + 3, `${run.computed} computed`));
  parts.push(circle(LEFT + 88, middle, 3.5), label(LEFT + 95, middle + 3, `${run.cached} cached`));
  parts.push(line(LEFT + 156, middle, LEFT + 174), label(LEFT + 178, middle + 3, `threshold ${number(threshold)}`));
  if (run.others.length) {
    const warning = `also ${run.others.join(", ")}: errors add up`;
    parts.push(label(RIGHT, TOP - 9, warning, { fill: THRESHOLD, anchor: "end" }));
  }
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", `${run.computed} evaluations computed, ${run.cached} cached`);
}

function square(x, y, size) {
  return make("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size }, { fill: COMPUTED });
}

function circle(cx, cy, r) {
  return make("circle", { cx, cy, r, "fill-opacity": 0.15, "stroke-width": 1.5 }, { stroke: CACHED, fill: CACHED });
}

function line(x1, y, x2, attributes = {}) {
  const dashes = { x1, y1: y, x2, y2: y, "stroke-dasharray": "5 3", "stroke-width": 1.5, ...attributes };
  return make("line", dashes, { stroke: THRESHOLD });
}

function label(x, y, text, { fill = INK, anchor = "start" } = {}) {
  const element = make("text", { x, y, "text-anchor": anchor }, { fill });
  element.textContent = text;
  return element;
}

function number(value) {
  return String(Number(value.toPrecision(2)));
}

function make(kind, attributes = {}, style = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  Object.assign(element.style, style);
  return element;
}
