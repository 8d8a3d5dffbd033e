"""Values that no node asks for, and how they get into a prompt in API form."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    -(2**63), -1, 0, 3, 9, 65, 2**31, 2**64, 10**400, -0.0, 0.1, 1e308, float("nan"), float("inf"), True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "1", "NaN", "None", "null", "\0", "a\0b", "\n", "\x1b[2J", "\ud800", "😀" * 3, "x" * 5000,
    "<script>alert(1)</script>", "{0.__class__}", "%s%n", "__import__('os').system('touch pwned')", "$(touch pwned)",
    "cpu,cpu", "cuda:0,0", "0," * 500, "127.0.0.1:0", "0.0.0.0:65536", "[::1]:-1", "user@host:22", "http://127.0.0.1/",
)  # fmt: skip
ELSEWHERE = (
    ".", "..", "/", "//", "/etc/passwd", "/dev/stdin", "/proc/self/environ", "../", "..\\..\\x", "tiny/", "tiny/.",
    "tiny/../tiny", "tiny/transformer", "./tiny", "~", "~/x", "file:///etc/passwd", "tiny\0", "C:\\x", "CON",
)  # fmt: skip
"""Names that are paths."""
NESTED: tuple[Any, ...] = (None, [], {}, [[]], [None], {"a": 1}, [1, 2, 3], {"__value__": None}, {"__value__": [1, 2]})


def values(nodes: Iterable[str], forbidden: Iterable[str]) -> st.SearchStrategy[Any]:
    """Anything that JSON can say, links to the right and wrong places among it."""
    links = st.tuples(
        st.sampled_from([*nodes, "0", "none", "-1", "", "1:1"]) | st.integers(-1, 9),
        st.integers(-2, 5) | st.sampled_from(["0", None, 0.5, 10**30]),
    ).map(list)
    scalars = st.sampled_from([*NUMBERS, *TEXTS, *ELSEWHERE, *forbidden])
    free = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    return scalars | links | st.sampled_from(NESTED) | free


@st.composite
def spoiled(
    draw: st.DrawFn, prompt: dict[str, Any], names: dict[str, list[str]], forbidden: Iterable[str]
) -> dict[str, Any]:
    """A prompt with one to three inputs of the nodes named replaced, dropped or added.

    Args:
        prompt: in API form.
        names: names of inputs, by the id of each node to spoil.
        forbidden: paths that lead to something that would load, were it where it may be.
    """
    prompt = copy.deepcopy(prompt)
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(sorted(names)))
        inputs = prompt[node]["inputs"]
        name = draw(st.sampled_from(names[node]) | st.sampled_from(["self", "cls", "unique_id", "__class__", "x.y"]))
        value = draw(values(prompt, forbidden))
        if draw(st.integers(0, 9)) == 0:
            inputs.pop(name, None)
        elif name in names[node] or not isinstance(value, list):
            # A link to a slot that is not there, at an input that no node has: ComfyUI's own executor ends by it.
            inputs[name] = value
    return prompt


@st.composite
def spoiled_workflows(draw: st.DrawFn, workflow: dict[str, Any], forbidden: Iterable[str]) -> dict[str, Any]:
    """A workflow in UI format with one to three fields of the pack's nodes replaced or dropped."""
    workflow = copy.deepcopy(workflow)
    nodes = [node for node in workflow["nodes"] if node["type"].startswith("HybridDiT_")]
    anything = values([str(node["id"]) for node in workflow["nodes"]], forbidden)
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(nodes))
        name = draw(st.just("widgets_values") | st.sampled_from(sorted(node)))
        fields = node.get(name)
        if isinstance(fields, (list, dict)) and fields and draw(st.integers(0, 4)):
            key = draw(st.sampled_from(sorted(fields) if isinstance(fields, dict) else range(len(fields))))
            fields[key] = draw(anything)
        elif draw(st.booleans()):
            node[name] = draw(anything)
        else:
            node.pop(name, None)
    return workflow
