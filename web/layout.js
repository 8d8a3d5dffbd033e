// Parallel Layout as it was saved before its switch stood first: the values stay with their names.

import { app } from "../../scripts/app.js";

const NODE = "HybridDiT_ParallelLayout";
const SWITCH = 6; // where the switch was; before that there was none, and the degrees counted
const BEFORE = [1, 1, 1, "auto", 1, "", false]; // what was meant where a value was not there yet

app.registerExtension({
  name: "HybridDiT.Layout",
  beforeRegisterNodeDef(nodeType, { name }) {
    if (name !== NODE) return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved, ...others) {
      return configure.call(this, { ...saved, widgets_values: inOrder(saved.widgets_values) }, ...others);
    };
  },
});

// Values in today's order. Those of before begin with a number, the degree of Ulysses.
function inOrder(values) {
  if (!Array.isArray(values) || typeof values[0] === "boolean") return values;
  const all = BEFORE.map((value, index) => values[index] ?? value);
  return [all[SWITCH], ...all.slice(0, SWITCH), ...values.slice(BEFORE.length)];
}
