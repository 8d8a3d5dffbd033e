"""What a user does by hand in an open workflow: set widgets, and put one node in the place of another.

All of it is LiteGraph's own API, called in the page, and reaches into subgraphs as a user does by opening them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .frontend import Frontend

ALWAYS = 0
"""LiteGraph's mode of a node that runs."""

_NODES = "app.graph.nodes.flatMap(node => node.subgraph ? [node, ...node.subgraph.nodes] : [node])"

_SET = f"""([type, name, values]) => {_NODES}
  .filter(node => type === null ? node.subgraph : node.type === type)
  .flatMap(node => node.widgets ?? []).filter(widget => widget.name === name)
  .map(widget => widget.value = values[String(widget.value)] ?? values["*"] ?? widget.value)"""

# The key of a node in the API form: that of its subgraph's node comes first.
_KEY = """const host = app.graph.nodes.filter(node => node.subgraph)[number];
  const graph = host.subgraph, key = node => `${host.id}:${node.id}`;"""

# In the order in which it loses nothing: the new node is wired before the old one goes. An input of the old one that
# comes from the subgraph's own input is drawn from there; both nodes have it for a moment.
_REPLACE = f"""([number, oldType, newType, values, count]) => {{
  {_KEY}
  const all = graph.nodes.filter(node => node.type === oldType), old = all[0];
  if (all.length !== count) throw new Error(`${{all.length}} nodes of type ${{oldType}}`);
  const node = LiteGraph.createNode(newType);
  graph.add(node);
  node.pos = [...old.pos];
  for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
  const lost = [];
  for (const input of old.inputs) {{
    if (input.link == null) continue;
    const link = graph.getLink(input.link), slot = node.inputs.findIndex(other => other.name === input.name);
    const made = slot < 0 ? null : link.origin_id === graph.inputNode.id
      ? graph.inputNode.slots[link.origin_slot].connect(node.inputs[slot], node)
      : graph.getNodeById(link.origin_id).connect(link.origin_slot, node, slot);
    if (!made) lost.push(input.name);
  }}
  const output = node.outputs.findIndex(output => output.type === old.outputs[0].type);
  for (const link of [...old.outputs[0].links].map(id => graph.getLink(id)))
    node.connect(output, graph.getNodeById(link.target_id), link.target_slot);
  graph.remove(old);
  return {{ old: key(old), new: key(node), output, lost }};
}}"""

_WIRE = f"""([number, type, name, values]) => {{
  {_KEY}
  let node = graph.nodes.find(node => node.type === type);
  if (!node) graph.add(node = LiteGraph.createNode(type));
  for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
  for (const target of graph.nodes) {{
    const slot = target.inputs?.findIndex(input => input.name === name && input.link == null) ?? -1;
    if (slot >= 0) node.connect(0, target, slot);
  }}
  return key(node);
}}"""


_MOVE = f"""([number, type, other, offset]) => {{
  {_KEY}
  const [node, beside] = [type, other].map(kind => graph.nodes.find(node => node.type === kind));
  node.pos = [beside.pos[0] + offset[0], beside.pos[1] + offset[1]];
}}"""


@dataclass(frozen=True)
class Replaced:
    """One node in the place of another.

    Args:
        old, new: their keys in the API form.
        output: number of the new node's output that took over the links of the old one's only output.
        lost: linked inputs of the old node that the new one has not, or of another type.
    """

    old: str
    new: str
    output: int
    lost: list[str]


def set_widgets(frontend: Frontend, node_type: str | None, name: str, values: dict[str, Any]) -> int:
    """Set a widget of all nodes of a type (None: of the subgraph's own node); how many there were.

    Args:
        values: what becomes of which value; ``"*"`` stands for all others.
    """
    return len(frontend.call(_SET, [node_type, name, values]))


def run_all(frontend: Frontend) -> None:
    """Undo the bypassing of all nodes that are outside subgraphs."""
    frontend.call("mode => app.graph.nodes.map(node => node.mode = mode)", ALWAYS)


def replace(
    frontend: Frontend, old_type: str, new_type: str, *, number: int = 0, of: int = 1, **values: Any
) -> Replaced:
    """Put a new node in the place of the first of a type in a subgraph, with the links whose inputs it has.

    Args:
        number: of the subgraph's node among those of the graph.
        of: how many of the type there are in it.
        values: of the new node's widgets.
    """
    return Replaced(**frontend.call(_REPLACE, [number, old_type, new_type, values, of]))


def wire(frontend: Frontend, node_type: str, name: str, *, number: int = 0, **values: Any) -> str:
    """Link a subgraph's node of a type, made if it is not there, to all free inputs of a name; its key."""
    return frontend.call(_WIRE, [number, node_type, name, values])


def move(frontend: Frontend, node_type: str, beside: str, offset: tuple[float, float]) -> None:
    """Move the subgraph's node of a type to a place beside its node of another type."""
    frontend.call(_MOVE, [0, node_type, beside, list(offset)])
