// Where a node is on the canvas.

import { app } from "../../scripts/app.js";

// The node of an execution id, such as "3:7" for node 7 in the subgraph of node 3.
export function findNode(executionId) {
  let graph = app.rootGraph, node;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}
