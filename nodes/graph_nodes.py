"""Nodes of the graph that is running, by the names that users see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

Prompt = dict[str, dict[str, Any]]


def executing_node() -> str | None:
    """The node that is being executed in this thread, such as ``'"Flux KV Cache" (node 12)'``; None outside of a graph.

    Its title if it has one of its own, else what ComfyUI calls it.
    """
    context = get_executing_context()
    return None if context is None else _named(_prompt(context.prompt_id), context.node_id)


def this_node() -> str:
    """`executing_node` for a message."""
    return executing_node() or "this node"


def nodes_before(input_name: str) -> list[str]:
    """The nodes with an input of a name among those that the executing node's inputs come from, the nearest first."""
    return [_named(prompt, node) for prompt, node in _before() if input_name in prompt[node].get("inputs", {})]


def makers_before(output: str) -> list[str]:
    """Likewise the nodes with an output of a type, such as ``"HOOKS"``."""
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})

    def makes(node: dict[str, Any]) -> bool:
        return output in (getattr(classes.get(node.get("class_type")), "RETURN_TYPES", None) or ())

    return [_named(prompt, node) for prompt, node in _before() if makes(prompt[node])]


def _before() -> Iterator[tuple[Prompt, str]]:
    """The prompt, and ids of the executing node and of those that its inputs come from, the nearest first."""
    context = get_executing_context()
    if context is None:
        return
    prompt = _prompt(context.prompt_id)
    seen: set[str] = set()
    waiting = [context.node_id]
    while waiting:
        node = waiting.pop(0)
        if node in seen or node not in prompt:
            continue
        seen.add(node)
        yield prompt, node
        inputs = prompt[node].get("inputs", {}).values()
        waiting += [value[0] for value in inputs if isinstance(value, list) and len(value) == 2]


def _named(prompt: Prompt, node_id: str) -> str:
    node = prompt.get(node_id, {})  # one that another node has made while it ran has no entry
    kind = node.get("class_type")
    names = getattr(sys.modules.get("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {})
    title = node.get("_meta", {}).get("title") or names.get(kind) or kind
    return f'"{title}" (node {node_id})' if title else f"node {node_id}"


def _prompt(prompt_id: str) -> Prompt:
    queue = getattr(PromptServer.instance, "prompt_queue", None)
    for item in list(getattr(queue, "currently_running", {}).values()):
        if item[1] == prompt_id:
            return item[2]
    return {}
